"""Virtual environments of the peer packages, one each, as they need different versions of torch.

They are made from the pinned files in ``requirements/`` below the user's cache folder:
``$SAE_KERNELS_CACHE_DIR/peers/NAME``, by default ``~/.cache/sae-kernels/peers/NAME``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.bench.processes import tied
from sae_kernels.errors import SaeKernelsError, name_hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


# The packages that others train sparse autoencoders with, as pinned, by the names of their modules.
PEERS = {
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "sae_lens": "sae-lens==6.54.12",
}
REQUIREMENTS = Path(__file__).parent / "requirements"
_MARKER = "installed.txt"


class EnvironmentSetupError(SaeKernelsError, RuntimeError):
    """Raised when an environment could not be made; the message holds pip's error."""


def folder(name: str) -> Path:
    """The folder of a peer's environment, which need not exist.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> folder("sae_lens").parts[-2:]
        ('peers', 'sae_lens')
    """
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}; {name_hint(name, PEERS)}")
    chosen = os.environ.get("SAE_KERNELS_CACHE_DIR")
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae-kernels"
    return (Path(chosen).expanduser().absolute() if chosen else shared) / "peers" / name


def python_of(name: str) -> Path | None:
    """The Python interpreter of a peer: its environment's, else this one if it can import it.

    Raises:
        ValueError: an unknown name.
    """
    if _ready(folder(name), name):
        return _python(folder(name))
    spec = find_spec(name)
    # A folder that happens to be called so has no origin.
    return None if spec is None or spec.origin is None else Path(sys.executable)


def setup(names: Iterable[str], show: Callable[[str], None]) -> None:
    """Makes the environments of these peers that do not exist yet.

    An environment made from other pins is made again. One that was interrupted does not count.

    Args:
        names: of :data:`PEERS`.
        show: takes a line for a person before and after each.

    Raises:
        ValueError: an unknown name, before anything is made.
        EnvironmentSetupError: Python or pip could not make one, or it cannot import its package.
    """
    for name, where in [(name, folder(name)) for name in names]:
        if _ready(where, name):
            show(f"{name}: there already, in {where}")
            continue
        show(f"{name}: installing into {where} (some GB, some minutes)")
        began = time.monotonic()
        torch_version = _make(where, name)
        show(f"{name}: ready after {time.monotonic() - began:.0f} s, with torch {torch_version}")


def _python(where: Path) -> Path:
    return where / "bin/python"


def _passes(name: str) -> dict[Path, list[str]]:
    """The requirement files to install from, in order, each with pip's options."""
    files = {REQUIREMENTS / f"{name}.txt": [], REQUIREMENTS / f"{name}.no-deps.txt": ["--no-deps"]}
    return {path: options for path, options in files.items() if path.exists()}


def _pins(name: str) -> str:
    return "".join(path.read_text() for path in _passes(name))


def _ready(where: Path, name: str) -> bool:
    marker = where / _MARKER
    return _python(where).exists() and marker.exists() and marker.read_text() == _pins(name)


def _make(where: Path, name: str) -> str:
    """Makes an environment, replacing an older one; returns its version of torch."""
    if where.exists():
        if any(where.iterdir()) and not (where / "pyvenv.cfg").exists():
            raise EnvironmentSetupError(
                f"{where}: expected an environment of ours or nothing, got other files; move them "
                "or choose another SAE_KERNELS_CACHE_DIR"
            )
        shutil.rmtree(where)
    where.parent.mkdir(parents=True, exist_ok=True)
    # -I: what PYTHONPATH offers here is not in the environment.
    python = [str(_python(where)), "-I"]
    _run(name, sys.executable, "-I", "-m", "venv", str(where))
    for path, options in _passes(name).items():
        pip = ("-m", "pip", "install", "--no-input", "--quiet", *options, "-r", str(path))
        _run(name, *python, *pip)
    said = _run(name, *python, "-c", f"import torch, {name}; print(torch.__version__)")
    (where / _MARKER).write_text(_pins(name))  # last: until here it does not count
    return said.split()[-1]


def _run(name: str, *command: str) -> str:
    done = subprocess.run(tied(command), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        why = _reason(done.stderr) or _reason(done.stdout) or "no reason given"
        raise EnvironmentSetupError(f"{name}: {why}")
    return done.stdout


def _reason(said: str) -> str:
    """The first error line of pip's output, else the last line, an exception's."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return [*errors, *lines[-1:], ""][0].removeprefix("ERROR:").strip()
