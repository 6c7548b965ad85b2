"""What this machine and installation are, in words; it raises nothing."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata, util
from pathlib import Path

import torch

from sae_kernels._version import __version__

_ROOT = Path(__file__).parent
_ASKED = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "ecc.mode.current",
    "mig.mode.current",
)


def cpu_model() -> str:
    """The processor's name, or at least its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what decides how the kernels run; None for what is not installed."""
    return {
        "sae_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cupy": _version("cupy"),
    }


def _version(module: str) -> str | None:
    if util.find_spec(module) is None:
        return None
    # CuPy's distributions are called after the CUDA that they are built for.
    names = metadata.packages_distributions().get(module, [module])
    try:
        return metadata.version(names[0])
    except metadata.PackageNotFoundError:
        return "unknown"


def checkout() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package lies in, and whether it has changes.

    None where the package is installed apart from one.
    """
    lies_in_one = _said("git", "ls-files", "--", "__init__.py")
    commit = _said("git", "rev-parse", "--short", "HEAD") if lies_in_one else ""
    changes = _said("git", "status", "--porcelain", "--untracked-files=no")
    return commit or None, bool(changes) if commit else None


def gpu(device: torch.device) -> dict[str, object]:
    """The GPU, its driver, and the clocks and limits it runs at just now."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "nvidia_smi": nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str]:
    """What the driver says about the first GPU; empty without the program."""
    said = _said("nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader")
    return dict(zip(_ASKED, said.partition("\n")[0].split(", "), strict=False)) if said else {}


def _said(*command: str) -> str:
    """What a program prints; nothing where it is not there."""
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
