"""The kernels compiled ahead of a loan: ``python -m benchmarks.gpu_check.warm --out FILE.zip``.

It compiles, without a GPU, what the tasks of `tasks` launch on an sm_90 and packs Triton's cache
with what it is good for. ``gpu_check --warm FILE.zip`` unpacks it where the run works. Triton looks
a kernel up by its source, its arguments and Triton's own files, so a file that does not fit is of
no use at all: `mismatches` says what differs, and the run compiles on the spot, on all cores.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks.gpu_check import dry_run
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.compiled_tests import VARIABLE
from benchmarks.gpu_check.tasks import TASKS
from sae_kernels import backends, gpu, machine
from sae_kernels.bench.processes import die_with, tied

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from benchmarks.gpu_check.bench import Record

ARCHITECTURE = 90
_FACTS = "made_with.json"


class Loads:
    """Kernels that a process loaded: how many were in the cache, and the names of the others."""

    def __init__(self) -> None:
        self.hits = 0
        self.misses: list[str] = []


@contextlib.contextmanager
def counted() -> Iterator[Loads]:
    """Counts what Triton finds in its cache, inside the block."""
    from triton import knobs

    loads = Loads()

    def listen(*, src: Any, cache_hit: bool, **_: object) -> None:
        if cache_hit:
            loads.hits += 1
        else:
            loads.misses.append(str(src.name))

    knobs.compilation.listener = listen
    try:
        yield loads
    finally:
        knobs.compilation.listener = None


def made_with() -> dict[str, str]:
    """What must be the same where a cache is made and where it is used."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return {
        "Triton": triton.__version__,
        "Python's extension modules": str(sysconfig.get_config_var("EXT_SUFFIX")),
        "Triton's files, libtriton among them": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": get_ptxas_version(ARCHITECTURE).strip().splitlines()[-1],
    }


def mismatches(file: Path) -> list[str]:
    """What this machine has otherwise than the one that made the cache."""
    with zipfile.ZipFile(file) as archive:
        then = json.loads(archive.read(_FACTS))["made with"]
    return [
        f"{what}: the cache is of {then.get(what)}, here is {here}"
        for what, here in made_with().items()
        if then.get(what) != here
    ]


def unpack(file: Path, folder: Path) -> int:
    """Puts a cache where Triton finds it; returns the number of kernels."""
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)  # never outside: it drops roots and ".."
    groups = list(folder.glob("*/__grp__*.json"))
    for group in groups:  # they name their files by the whole path on the other machine
        listed = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / name) for name in listed}
        group.write_text(json.dumps({"child_paths": here}))
    return len(groups)


def compile_all(names: Iterable[str], folder: Path, seconds: float) -> Iterator[Record]:
    """Compiles what tasks launch into a cache, a process a core; a record per task."""
    context = multiprocessing.get_context("spawn")
    surroundings = {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    with mock.patch.dict(os.environ, surroundings):  # the processes inherit it
        pool = ProcessPoolExecutor(
            len(os.sched_getaffinity(0)), context, initializer=die_with, initargs=(os.getpid(),)
        )
        with pool:
            try:
                yield from pool.map(compile_task, names, timeout=max(1.0, seconds))
            except OutOfTime:
                why = f"not done after {seconds:.0f} s; the tasks compile what is missing"
                yield {"kind": "failed", "what": "compiling ahead", "why": why}
                for process in pool._processes.values():
                    process.kill()


def compile_task(name: str) -> Record:
    """Compiles the kernels of a task, and the launchers of them."""
    from triton.backends.nvidia.driver import CudaLauncher

    from benchmarks.aot import only_compiling

    def note(kernel: Any) -> None:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            CudaLauncher(kernel.src, kernel.metadata)

    if not torch.cuda.is_available():
        dry_run.driver_library()
    seen: set[str] = set()
    why = ""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    capability = mock.Mock(return_value=divmod(ARCHITECTURE, 10))
    with (
        counted() as loads,
        only_compiling(ARCHITECTURE, note),
        backends.use(dry_run.BACKENDS),
        mock.patch.object(gpu, "triton_reason", return_value=None),
        mock.patch.object(torch.cuda, "get_device_capability", capability),
        mock.patch.object(torch.cuda, "get_device_name", return_value="an sm_90"),
        _zeros(),
    ):
        try:
            for _ in TASKS[name].run(Bench(torch.device("cpu"), compiling=True)):
                pass
        except Exception as error:  # what it launched until then is compiled
            why = f"{type(error).__name__}: {error}"[:300]
    counts = {"found": loads.hits, "compiled": len(loads.misses)}
    return {"kind": "compiled ahead", "what": name, **counts, "why": why}


def compile_tests(folder: Path, *chosen: str) -> None:
    """Compiles what the primitives' tests launch, by running them emulated."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_check.compiled_tests"]
    command += ["--emulate", f"sm_{ARCHITECTURE}", *(chosen or ["tests/primitives"])]
    environment = {**os.environ, VARIABLE: str(folder.resolve())}
    subprocess.run(tied(command), cwd=dry_run.TESTS.parent, env=environment, check=True)


@contextlib.contextmanager
def _zeros() -> Iterator[None]:
    """Outputs of kernels that do not run are zeros: valid latents, counts and offsets.

    So are products into a buffer, which are a library's and take long on the CPU.
    """
    product = torch.mm

    def mm(*operands: torch.Tensor, out: torch.Tensor | None = None, **options: Any) -> Any:
        return product(*operands, **options) if out is None else out

    with (
        mock.patch.object(torch, "empty", torch.zeros),
        mock.patch.object(torch, "empty_like", torch.zeros_like),
        mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        mock.patch.object(torch, "mm", mm),
    ):
        yield


def pack(folder: Path, file: Path) -> dict[str, Any]:
    """Writes a cache and what it is good for into one file; returns the facts about it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    facts = {
        "made with": made_with(),
        "kernels": sum(path.name.startswith("__grp__") for path in paths),
        "bytes": sum(path.stat().st_size for path in paths),
        "commit": machine.checkout()[0],
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(_FACTS, json.dumps(facts))
        for path in paths:
            archive.write(path, path.relative_to(folder))
    return facts


def main() -> None:
    """Compiles and packs; says how big the file is and which tasks it lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file, FILE.zip")
    parser.add_argument("--only", nargs="+", default=[""], help="tasks whose names hold a word")
    parser.add_argument("--tests", action="store_true", help="of the tests too: takes long")
    options = parser.parse_args()
    names = [name for name in TASKS if any(word in name for word in options.only)]
    folder = options.out.with_suffix("")
    for record in compile_all(names, folder, 1e6):
        print(f"{record['what']}: {record['compiled']} compiled {record['why']}", flush=True)
    if options.tests:
        compile_tests(folder)
    facts = pack(folder, options.out)
    size = options.out.stat().st_size / 2**20
    print(f"{facts['kernels']} kernels, {facts['bytes'] / 2**20:.1f} MiB, packed {size:.1f} MiB")
    for what, value in facts["made with"].items():
        print(f"to be used with {what}: {value}")


if __name__ == "__main__":
    main()
