"""Tests of ``sae_kernels.integrations`` in another library's environment.

``python -m benchmarks.peer_tests LIBRARY`` runs our own tests with that library, in the environment
that ``sae-kernels bench --setup-peers`` made. With ``--suite CHECKOUT`` it runs the library's test
suite instead, once as shipped and once accelerated, and compares the tests that pass. The checkout
is a path on this machine: nothing is fetched, and the Hugging Face hub counts as offline.

Exit code 0: our tests pass; or every test of theirs that passes as shipped passes accelerated.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.bench.environments import PEERS, python_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[1]
# pytest and what it imports: pure Python, borrowed from this environment, as theirs has none.
PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")
ACCELERATED = "benchmarks.accelerated"
SHIMS = {"sae_lens": "benchmarks.saelens_618"}
BARE = [
    "-q",
    "--continue-on-collection-errors",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=",
    "-W",
    "ignore",
]


@contextlib.contextmanager
def borrowed() -> Iterator[Path]:
    """A folder for PYTHONPATH with links to our packages and to pytest, and nothing else."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for package in ("sae_kernels", "benchmarks"):
            (folder / package).symlink_to(ROOT / package)
        for package in PYTEST:
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.origin is not None:
                origin = Path(spec.origin)
                whole = origin.parent if origin.stem == "__init__" else origin
                (folder / whole.name).symlink_to(whole)
        yield folder


def run(library: str, arguments: Sequence[str], where: Path, **variables: str) -> int:
    """Runs pytest in a library's environment; returns its exit code."""
    python = python_of(library)
    if python is None:
        raise SystemExit(
            f"{library}: expected its environment, found none; sae-kernels bench --setup-peers "
            f"{library} makes it"
        )
    with borrowed() as path:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(python), "-m", "pytest", *BARE, *arguments]
        environment = kept | offline | variables | {"PYTHONPATH": str(path)}
        return subprocess.run(command, cwd=where, env=environment).returncode


def passed(results: Path) -> set[str]:
    """The tests that passed, of pytest's JUnit file."""
    return {
        f"{case.get('classname')}::{case.get('name')}"
        for case in ET.parse(results).iter("testcase")
        if not [each for each in case if each.tag in ("failure", "error", "skipped")]
    }


def suite(library: str, checkout: Path, level: str, selection: Sequence[str]) -> int:
    """Runs their tests as shipped and accelerated; prints what differs."""
    if not (checkout / "tests").is_dir():
        raise SystemExit(f"{checkout}: expected a checkout with a folder tests, found none")
    shims = ["-p", SHIMS[library]] if library in SHIMS else []
    ways: list[set[str]] = []
    for plugins, variables in (
        ([], {}),
        (["-p", ACCELERATED], {"ACCELERATE": f"{library}:{level}"}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.xml"
            arguments = [*shims, *plugins, f"--junitxml={results}", *(selection or ["tests"])]
            code = run(library, arguments, checkout, **variables)
            if not results.exists():
                raise SystemExit(f"{library}: expected results of pytest, got exit code {code}")
            ways.append(passed(results))
    shipped, accelerated = ways
    lost, gained = sorted(shipped - accelerated), sorted(accelerated - shipped)
    print(f"{library}: {len(shipped)} tests pass as shipped, {len(accelerated)} at level {level}")
    print(
        *[f"  lost    {name}" for name in lost], *[f"  gained  {name}" for name in gained], sep="\n"
    )
    return 1 if lost or not shipped else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=PEERS)
    parser.add_argument("--suite", type=Path, metavar="CHECKOUT")
    parser.add_argument("--level", default="module", choices=("module", "trainer"))
    options, selection = parser.parse_known_args()  # the rest is for pytest
    if options.suite is not None:
        checkout = options.suite.resolve()
        return suite(options.library, checkout, options.level, selection)
    own = [str(path) for path in sorted(ROOT.glob("tests/integrations/test_*.py"))]
    with tempfile.TemporaryDirectory() as folder:
        return run(options.library, ["--noconftest", *own, *selection], Path(folder))


if __name__ == "__main__":
    sys.exit(main())
