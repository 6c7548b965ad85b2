"""Interleaved timing: every round runs every contestant once, so that drift affects all equally.

The order rotates from round to round, so that nobody always inherits the same caches.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sae_kernels.bench.contestants.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sae_kernels.bench.contestants.clock import Reading

_T = TypeVar("_T")


class Timing(NamedTuple):
    """Median and percentiles of a contestant's times, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock | None = None,
    warmup: int = 1,
    untimed: int = 0,
) -> dict[str, Timing]:
    """Times each contestant once per round, after rounds of warm-up.

    ``untimed`` runs of it come first in each of its turns: a step of a training follows a step of
    the same training, and finds the caches and the allocator as that left them.
    """
    clock = clock or Clock()
    readings: dict[str, list[Reading]] = {name: [] for name in contestants}
    for round_ in range(warmup + rounds):
        for name in in_turn(list(contestants), round_):
            for _ in range(untimed):
                contestants[name]()
            clock.start()
            contestants[name]()
            reading = clock.stop()
            if round_ >= warmup:
                readings[name].append(reading)
    return {name: summary([read() for read in taken]) for name, taken in readings.items()}


def in_turn(contestants: Sequence[_T], round_: int) -> list[_T]:
    """The order of the contestants in a round, rotated by its number."""
    turn = round_ % max(1, len(contestants))
    return [*contestants[turn:], *contestants[:turn]]


def summary(seconds: Iterable[float]) -> Timing:
    """Median, 20th and 80th percentile of times in seconds.

    Example:
        >>> summary([0.003, 0.001, 0.002])
        Timing(median_ms=2.0, p20_ms=1.0, p80_ms=3.0)
    """
    ms = sorted(1e3 * s for s in seconds)
    return Timing(statistics.median(ms), ms[len(ms) // 5], ms[-1 - len(ms) // 5])
