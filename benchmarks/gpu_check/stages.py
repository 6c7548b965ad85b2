"""The stages of a run, in order: what would be missed most comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu_check import build, compared, correctness, sanitizer, tasks
from benchmarks.gpu_check.processes import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu_check.bench import Record
    from benchmarks.gpu_check.processes import Place

    Stage = Callable[[Place], Iterator[Record]]

_AT_ONCE = 4  # processes on the GPU where nothing is timed


def _timed(chosen: dict[str, tasks.Task]) -> Stage:
    """One after the other, each alone on the GPU."""
    return lambda place: run(list(chosen), place)


def _at_once(chosen: dict[str, tasks.Task]) -> Stage:
    """Side by side."""
    return lambda place: run(list(chosen), place, 1 if place.dry else _AT_ONCE)


STAGES: dict[str, Stage] = {
    "build": build.install,
    "cache": build.cache,
    "oracles": _at_once(tasks.ORACLES),
    "gluon": _timed(tasks.GLUON),
    "rates": _timed(tasks.RATES),
    "select": _timed(tasks.SELECT),
    "step": _timed(tasks.STEP),
    "screen": _timed(tasks.SCREEN),
    "decode": _timed(tasks.DECODE),
    "hot": _timed(tasks.HOT),
    "repeats": _at_once(tasks.REPEATS),
    "sanitizer": sanitizer.first,
    "more": _timed(tasks.MORE),
    "tests": correctness.tests,
    "bench": compared.bench,
    "sanitizer-rest": sanitizer.rest,
}
