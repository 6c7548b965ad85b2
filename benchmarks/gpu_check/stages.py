"""The stages of a run, in order: what would be missed most comes first."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from benchmarks.gpu_check import build, compared, correctness, sanitizer, tasks
from benchmarks.gpu_check.processes import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.gpu_check.bench import Record
    from benchmarks.gpu_check.processes import Crew, Place

_AT_ONCE = 4  # processes on the GPU where nothing is timed


def stages(crew: Crew, warm: Path | None) -> dict[str, Callable[[Place], Iterator[Record]]]:
    """What a run does: a name, and the records of it."""

    def timed(chosen: dict[str, tasks.Task]) -> Callable[[Place], Iterator[Record]]:
        return lambda place: run(list(chosen), place, crew)

    def at_once(chosen: dict[str, tasks.Task]) -> Callable[[Place], Iterator[Record]]:
        return lambda place: run(list(chosen), place, crew, 1 if place.dry else _AT_ONCE)

    return {
        "build": build.install,
        "cache": functools.partial(build.cache, file=warm),
        "oracles": at_once(tasks.ORACLES),
        "gluon": timed(tasks.GLUON),
        "rates": timed(tasks.RATES),
        "select": timed(tasks.SELECT),
        "step": timed(tasks.STEP),
        "decode": timed(tasks.DECODE),
        "hot": timed(tasks.HOT),
        "repeats": at_once(tasks.REPEATS),
        "sanitizer": sanitizer.first,
        "more": timed(tasks.MORE),
        "tests": correctness.tests,
        "bench": compared.bench,
        "sanitizer-rest": sanitizer.rest,
    }


STAGES = (
    "build", "cache", "oracles", "gluon", "rates", "select", "step", "decode", "hot", "repeats",
    "sanitizer", "more", "tests", "bench", "sanitizer-rest",
)  # fmt: skip
