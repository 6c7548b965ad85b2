"""The GPU tests, a process per test module side by side: compiling is most of their time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.gpu_check.outcomes import VARIABLE
from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu_check.bench import Record

_TESTS = Path(__file__).parent.parent.parent / "tests"
_NOTHING_COLLECTED = 5
_FEW_THREADS = {"OMP_NUM_THREADS": "2"}  # of each of the many processes
# What a dry run samples: one kernel in Triton's interpreter, and that the GPU tests are skipped.
_DRY_MODULE, _DRY_SELECTION = "primitives/test_decode.py", "1x1x1x1"


class Run(NamedTuple):
    """One pytest process: a module, what is selected from it, and its environment."""

    module: str
    environment: dict[str, str]
    selection: str = ""


def runs(dry: bool) -> list[Run]:
    """The processes of this stage."""
    gpu = [Run(_name(path), {}) for path in sorted((_TESTS / "gpu").glob("test_*.py"))]
    if dry:
        return [Run(_DRY_MODULE, {"TRITON_INTERPRET": "1"}, _DRY_SELECTION), *gpu]
    where = {"SAE_TEST_DEVICE": "cuda"}
    return gpu + [Run(_name(path), where) for path in (_TESTS / "primitives").glob("test_*.py")]


def _name(path: Path) -> str:
    return path.relative_to(_TESTS).as_posix()


def tests(dry: bool, seconds: float) -> Iterator[Record]:
    """A record per kernel and backend, one per failed test, and one per run that did not finish."""
    deadline = time.monotonic() + seconds
    side_by_side = max(1, (os.cpu_count() or 1) // 2)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(side_by_side) as pool:
        done = list(pool.map(lambda run: _run(run, Path(folder), deadline), runs(dry)))
    for record, _ in done:
        yield record
    outcomes = [outcome for _, found in done for outcome in found]
    for outcome in outcomes:
        if outcome["outcome"] == "failed":
            yield {"kind": "failed", "what": outcome["test"], "why": outcome["why"]}
    for (kernel, backend), counts in sorted(by_kernel(outcomes).items()):
        found = {name: counts[name] for name in ("passed", "failed", "skipped")}
        yield {"kind": "tests", "kernel": kernel, "backend": backend, **found}


def by_kernel(outcomes: list[dict[str, Any]]) -> dict[tuple[str, str], Counter[str]]:
    """Counts of the tests' outcomes, by kernel and backend."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        for kernel in outcome["kernels"]:
            counts.setdefault((kernel, outcome["backend"]), Counter())[outcome["outcome"]] += 1
    return counts


def _run(run: Run, folder: Path, deadline: float) -> tuple[Record, list[dict[str, Any]]]:
    """One process to its end, or to the deadline; what it said either way."""
    noted = folder / run.module.replace("/", "-")
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_check.outcomes", "-q"]
    command += [str(_TESTS / run.module)] + (["-k", run.selection] if run.selection else [])
    start = time.monotonic()
    process = subprocess.Popen(
        tied(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **_FEW_THREADS, **run.environment, VARIABLE: str(noted)},
        cwd=_TESTS.parent,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(0.0, deadline - start))
        finished = process.returncode in (0, 1, _NOTHING_COLLECTED)
        why = "" if finished else output[-800:]
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        finished, why = False, "stopped when the stage's time was up"
    outcomes = [json.loads(line) for line in _lines(noted)]
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    record = {
        "kind": "run",
        "what": run.module,
        "where": run.environment,
        "finished": finished,
        "seconds": round(time.monotonic() - start, 1),
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "why": why,
    }
    return record, outcomes


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
