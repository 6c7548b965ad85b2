"""Rates from measured steps.

A step's time is linear in the time per unit of work, so the fit is least squares on relative
errors with no time below 0. A unit that the steps say little about is drawn to its nominal rate: a
step is taken to be off by 10 %, a nominal rate by a factor of two, so that the pull is 0.1.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PULL = 0.1


class Observation(NamedTuple):
    """A step that was measured: its work by unit, and its seconds."""

    amounts: dict[str, float]
    seconds: float


def fit(
    seen: Sequence[Observation], nominal: Mapping[str, float], pull: float = PULL
) -> dict[str, float]:
    """Rates of the units that occur, by least squares; infinite where a unit costs nothing.

    Minimises over times t >= 0 per unit, of nominal t0, ``sum_i (work_i t / seconds_i - 1)^2 +
    pull^2 sum_u (t_u / t0_u - 1)^2``.

    Args:
        seen: steps.
        nominal: rates, of all units that occur.
        pull: how much a nominal rate counts beside a step; near 0 it decides nothing that the steps
            decide.

    Example:
        >>> steps = [Observation({"moved": 6e9}, 2.0), Observation({"moved": 3e9}, 1.0)]
        >>> round(fit(steps, {"moved": 1e9}, pull=1e-6)["moved"] / 3e9, 6)
        1.0
    """
    names = sorted({unit for step in seen for unit in step.amounts})
    if not names:
        return {}
    shares = [
        [step.amounts.get(unit, 0.0) / nominal[unit] / step.seconds for unit in names]
        for step in seen
    ]
    rows = np.vstack([np.array(shares), pull * np.eye(len(names))])
    aims = np.concatenate([np.ones(len(seen)), np.full(len(names), pull)])
    times = _nonnegative(rows, aims)
    return {
        unit: nominal[unit] / float(time) if time > 0 else float("inf")
        for unit, time in zip(names, times, strict=True)
    }


def _nonnegative(rows: np.ndarray, aims: np.ndarray) -> np.ndarray:
    """The least-squares solution without a negative part: the best over all sets of parts above 0.

    There are few units, so that all sets can be tried.
    """
    n = rows.shape[1]
    best, least = np.zeros(n), float(aims @ aims)
    for chosen in itertools.product((False, True), repeat=n):
        tried = np.zeros(n)
        tried[list(chosen)] = np.linalg.lstsq(rows[:, chosen], aims, rcond=None)[0]
        error = float(np.square(rows @ tried - aims).sum())
        if error < least and (tried >= 0).all():
            best, least = tried, error
    return best
