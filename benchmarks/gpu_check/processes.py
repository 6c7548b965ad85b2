"""Runs tasks in processes with a time limit each; what fails or hangs costs its task alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.gpu_check import journal
from benchmarks.gpu_check.tasks import TASKS
from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from benchmarks.gpu_check.bench import Record

_POLL_S = 0.02
_START_S = 60  # that a process may take to import everything
_DRY_FACTOR = 10  # the emulator is slow, and so are busy machines
_SHOWN = 1500  # characters of what a process said last


@dataclass
class Place:
    """Where, how and for how long a run works.

    Attributes:
        folder: for logs, the records of processes and the kernels' cache.
        dry: whether the kernels are emulated.
        deadline: of ``time.monotonic()``.
        finished: tasks that an earlier run finished.
        only: words, one of which is in the name of each task that is wanted; empty for all.
        warm: a file of kernels that were compiled ahead.
        results: the folder for what is read later.
        crew: the processes for its tasks.
    """

    folder: Path
    dry: bool
    deadline: float
    finished: frozenset[str] = frozenset()
    only: tuple[str, ...] = ()
    warm: Path | None = None
    results: Path | None = None

    def __post_init__(self) -> None:
        self.crew = Crew(self)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def todo(self, names: Sequence[str]) -> list[str]:
        """The tasks that are wanted and not finished."""
        wanted = [n for n in names if not self.only or any(o in n for o in self.only)]
        return [name for name in wanted if name not in self.finished]

    def log(self, name: str) -> Path:
        """The file for what a process says."""
        path = self.folder / "logs" / f"{name.replace('/', '-').replace(' ', '-')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def environment(self) -> dict[str, str]:
        """Of every process: kernels come from, and go to, the run's own cache."""
        return {**os.environ, "TRITON_CACHE_DIR": str(self.folder / "triton")}


class Crew:
    """Processes that have imported everything, one always ready for the next task."""

    def __init__(self, place: Place) -> None:
        self._place, self._started = place, 0
        self._ready: deque[tuple[subprocess.Popen[str], Path]] = deque()

    def take(self, name: str, records: Path) -> tuple[subprocess.Popen[str], Path]:
        """A process at work on the task, and its log; starts the next one."""
        if not self._ready:
            self._start()
        process, log = self._ready.popleft()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already: its log says why
            process.stdin.write(json.dumps({"task": name, "records": str(records)}) + "\n")
            process.stdin.close()
        self._start()
        return process, log

    def _start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu_check.worker"]
        log = self._place.log(f"worker {self._started}")
        self._started += 1
        with log.open("w") as output:
            process = subprocess.Popen(
                tied(command + ["--dry-run"] * self._place.dry),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=self._place.environment(),
                start_new_session=True,
            )
        self._ready.append((process, log))

    def dismiss(self) -> None:
        """Ends those that wait."""
        for process, _ in self._ready:
            end(process)


class Running(Protocol):
    """Something under way in a process of its own."""

    def poll(self) -> Iterator[Record]:
        """The records since the last time; the last one of all is of kind "done"."""


class _Running:
    """A task under way: its records, read as they are written, and its end."""

    def __init__(self, name: str, place: Place) -> None:
        self.name, self._place, self._began = name, place, time.monotonic()
        self._limit = TASKS[name].limit_s * (_DRY_FACTOR if place.dry else 1)
        self._at_work = False
        records = place.log(name).with_suffix(".jsonl")
        records.unlink(missing_ok=True)
        self._process, self._log = place.crew.take(name, records)
        self._records, self._read = records, 0
        self._bad = ""

    def poll(self) -> Iterator[Record]:
        """What came since the last time; the last is of kind "done"."""
        ended, cut = self._process.poll() is not None, self._place.left() <= 0
        seconds = time.monotonic() - self._began
        late = not ended and (cut or seconds > self._limit + _START_S * (not self._at_work))
        if late:
            end(self._process)
        for line in self._new_lines():
            record = json.loads(line)
            if record["kind"] == "began":
                self._at_work, self._began = True, time.monotonic()
                continue
            if record["kind"] == "failed" or record.get("ok") is False:
                self._bad = str(record.get("why") or record.get("what"))
            yield {**record, "task": self.name}
        if late:
            why = f"killed after {seconds:.0f} s; it said: {said(self._log)}"
            outcome = "no time" if cut else "failed"
            if outcome == "failed":
                yield {"kind": "failed", "what": self.name, "task": self.name, "why": why}
            yield journal.done(self.name, outcome, seconds, why)
        elif ended and self._process.returncode:
            why = f"ended with {self._process.returncode}; it said: {said(self._log)}"
            yield {"kind": "failed", "what": self.name, "task": self.name, "why": why}
            yield journal.done(self.name, "failed", seconds, why)
        elif ended:
            yield journal.done(self.name, "failed" if self._bad else "passed", seconds, self._bad)

    def _new_lines(self) -> list[str]:
        if not self._records.exists():
            return []
        with self._records.open() as file:
            file.seek(self._read)
            text = file.read()
        whole, newline, _ = text.rpartition("\n")
        self._read += len((whole + newline).encode())
        return whole.splitlines()


def run(names: Sequence[str], place: Place, side_by_side: int = 1) -> Iterator[Record]:
    """The records of tasks in their order, so many at once; each ends with one of kind "done"."""
    return polled(
        names, place, side_by_side, lambda name: TASKS[name].least_s, lambda n: _Running(n, place)
    )


def polled(
    names: Sequence[str],
    place: Place,
    side_by_side: int,
    least_s: Callable[[str], float],
    start: Callable[[str], Running],
    poll_s: float = _POLL_S,
) -> Iterator[Record]:
    """Starts what is wanted and not finished, so many at once, and hands on what it says.

    Args:
        names: in the order to start them.
        place: where.
        side_by_side: how many at once.
        least_s: seconds that must be left for one to be started.
        start: starts one.
        poll_s: seconds between looks at what runs.
    """
    waiting, running = deque(place.todo(names)), list[Running]()
    while waiting or running:
        while waiting and len(running) < side_by_side:
            name = waiting.popleft()
            if place.left() < least_s(name):
                yield journal.done(name, "no time", 0, f"{place.left():.0f} s are left")
            else:
                running.append(start(name))
        for each in list(running):
            for record in each.poll():
                if record["kind"] == "done":
                    running.remove(each)
                yield record
        time.sleep(poll_s)


def end(process: subprocess.Popen[Any]) -> None:
    """Kills a process and all that it started; one that a driver holds on to is left to it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def said(log: Path) -> str:
    """The last that a process said."""
    return log.read_text(errors="replace")[-_SHOWN:].strip() or "nothing"
