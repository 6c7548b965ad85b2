"""The GPU tests, a process per test module side by side: compiling is most of their time.

A test that ends or stops its process, or loses the GPU's context, costs itself alone: it is noted
and the module goes on without it in a new process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.gpu_check import journal, outcomes
from benchmarks.gpu_check.dry_run import TESTS
from benchmarks.gpu_check.processes import end, polled, said
from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from benchmarks.gpu_check.bench import Record
    from benchmarks.gpu_check.processes import Place

_LEAST_S = 20
_TEST_S = 60  # of one test, its kernels compiled
_POLL_S = 0.1
_COLLECTED = (0, 1, 5)  # exit codes of pytest: passed, failed, nothing was collected
_FEW_THREADS = {"OMP_NUM_THREADS": "2"}  # of each of the many processes
# What a dry run samples: one kernel, emulated, and that the GPU tests are skipped.
_DRY = ("primitives/test_pick_dead.py", "gpu/test_gpu_select_topk.py")


class Module(NamedTuple):
    """A test module, and how pytest runs it.

    Attributes:
        name: its path in tests/.
        environment: of the process.
        options: of pytest.
    """

    name: str
    environment: dict[str, str]
    options: tuple[str, ...] = ()


def modules(dry: bool) -> list[Module]:
    """The test modules to run: those for GPUs alone first, then those of every backend."""
    found = [_name(path) for room in ("gpu", "primitives") for path in _tests(room)]
    if dry:
        return [Module(name, {}, ("--emulate", "sm_90")) for name in _DRY]
    on_gpu = {"SAE_TEST_DEVICE": "cuda"}
    return [Module(name, {} if name.startswith("gpu") else on_gpu) for name in found]


def _tests(room: str) -> list[Path]:
    return sorted((TESTS / room).glob("test_*.py"))


def _name(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


def tests(place: Place) -> Iterator[Record]:
    """A record per failed test, then one per module and kernel, as far as the time goes."""
    every = {module.name: module for module in modules(place.dry)}
    side_by_side = max(1, (os.cpu_count() or 1) // 2)
    return polled(
        list(every),
        place,
        side_by_side,
        lambda _: _LEAST_S,
        lambda name: _Running(every[name], place),
        _POLL_S,
    )


class _Running:
    """A module under way: its process, and the outcomes that it noted."""

    def __init__(self, module: Module, place: Place) -> None:
        self._module, self._place = module, place
        self._log = place.log(module.name)
        self._noted = self._log.with_suffix(".jsonl")
        self._begin, self._told = time.monotonic(), set[str]()
        outcomes.keep_known(self._noted)  # of an earlier run that this one resumes
        self._start()

    def _start(self) -> None:
        self._known = len(outcomes.read(self._noted))
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_check.outcomes", "-q"]
        command += ["-n", "0", *self._module.options]
        variables = {**_FEW_THREADS, **self._module.environment}
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                tied([*command, str(TESTS / self._module.name)]),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **self._place.environment(),
                    **variables,
                    outcomes.VARIABLE: str(self._noted),
                },
                cwd=TESTS.parent,
                start_new_session=True,
            )

    def poll(self) -> Iterator[Record]:
        """Tests that failed since the last time; the last record is of kind "done"."""
        ended, out_of_time = self._process.poll() is not None, self._place.left() < 0
        known = outcomes.read(self._noted)
        under_way = [line for line in known.values() if line["outcome"] == "began"]
        idle = time.time() - self._noted.stat().st_mtime if known else 0
        hangs = not ended and idle > _TEST_S and bool(under_way)
        if out_of_time or hangs:
            end(self._process)
        if not out_of_time and (ended or hangs):
            for line in under_way:
                why = f"killed after {_TEST_S} s" if hangs else "its process ended"
                why += f"; it said: {said(self._log)}"
                outcomes.note(self._noted, {**line, "outcome": "failed", "why": why})
            known = outcomes.read(self._noted)
        for name, line in known.items():
            if line["outcome"] == "failed" and name not in self._told:
                self._told.add(name)
                yield self._record(kind="failed", what=name, why=line["why"])
        status = self._process.returncode
        if out_of_time:
            yield self._done("no time")
        elif (hangs or ended) and status not in _COLLECTED and len(known) > self._known:
            self._start()  # for the rest of the module
        elif ended:
            if status not in _COLLECTED:
                why = f"ended with {status}; it said: {said(self._log)}"
                yield self._record(kind="failed", what=self._module.name, why=why)
            yield from self._counts(known)
            ran = any(line["outcome"] in ("passed", "failed") for line in known.values())
            bad = bool(self._told) or status not in _COLLECTED
            yield self._done("failed" if bad else "passed" if ran else "not available")

    def _counts(self, known: dict[str, dict[str, Any]]) -> Iterator[Record]:
        for (kernel, backend), counts in sorted(by_kernel(known.values()).items()):
            found = {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")}
            yield self._record(kind="tests", kernel=kernel, backend=backend, **found)

    def _record(self, **fields: Any) -> Record:
        return {**fields, "task": self._module.name}

    def _done(self, outcome: str) -> Record:
        return journal.done(self._module.name, outcome, time.monotonic() - self._begin)


def by_kernel(found: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Counter[str]]:
    """Counts of the tests' outcomes, by kernel and backend."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in found:
        for kernel in outcome["kernels"]:
            counts.setdefault((kernel, outcome["backend"]), Counter())[outcome["outcome"]] += 1
    return counts
