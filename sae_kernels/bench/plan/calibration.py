"""Calibrating a device's rates by stored results: measured product and copy, then fitted steps.

A step's time is linear in the time per unit of work, so the fit is least squares on relative
errors with no time below 0. A unit that the steps say little about is drawn to its nominal rate: a
step is taken to be off by 10 %, a nominal rate by a factor of two, so that the pull is 0.1.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

import sae_kernels
from sae_kernels import machine
from sae_kernels.bench import results
from sae_kernels.errors import DataError

from .devices import Device, isa
from .layouts import Layout, Problem
from .prediction import amounts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PRODUCTS = ("bfloat16", "float32")


PULL = 0.1


class Observation(NamedTuple):
    """A measured step: its work by unit, and its seconds."""

    amounts: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """The calibrated rates of a device and their origins."""

    rates: dict[str, float]  # per second, by unit
    origins: dict[str, str]  # by unit "nominal", "measured" (alone, in a result's run) or "fitted"
    files: list[str] = field(default_factory=list)  # names of the results that count
    steps: int = 0  # measured steps of ours that the fit is of

    def text(self, device: Device) -> str:
        """One sentence about the origin of the rates."""
        if not self.files:
            return f"not calibrated: no stored result for {device.name}"
        parts = []
        for origin in ("fitted", "measured", "nominal"):
            if units := [unit for unit, came in self.origins.items() if came == origin]:
                parts.append(f"{origin}: {', '.join(units)}")
        by = f"{self.steps} steps" if self.steps else "rates"
        return f"calibrated by {by} in {', '.join(self.files)} ({'; '.join(parts)})"


def calibrated(device: Device, files: Sequence[str | Path] | None = None) -> Calibration:
    """Calibrates a device by result files; None takes those of the checkout.

    Raises:
        DataError: a named file is missing, damaged or tells nothing of this device.
    """
    found = {}
    for path in stored() if files is None else map(Path, files):
        try:
            found[path] = _read(path, device)
        except DataError:  # the checkout has results of other devices and of other kinds
            if files is not None:
                raise
    rates, origins = dict(device.rates), dict.fromkeys(device.rates, "nominal")
    for read in found.values():
        measured = _measured_rates(read)
        rates.update(measured)
        origins.update(dict.fromkeys(measured, "measured"))
    seen = [step for read in found.values() for step in observations(read, device)]
    fitted = fit(seen, rates)
    origins.update(dict.fromkeys(fitted, "fitted"))
    return Calibration(rates | fitted, origins, [path.name for path in found], len(seen))


def _read(path: Path, device: Device) -> results.Results:
    read = results.read(path)
    reason = foreign(read.provenance, device)
    if reason is not None:
        raise DataError(f"{path}: expected results of {device.name}, got {reason}")
    if not (observations(read, device) or _measured_rates(read)):
        raise DataError(f"{path}: expected a measured step of ours or rates, got neither")
    return read


def stored() -> list[Path]:
    """The result files of the checkout; none if the package is installed."""
    package = sae_kernels.__file__
    assert package is not None
    return sorted((Path(package).parents[1] / "benchmarks" / "results").glob("*.jsonl"))


def foreign(provenance: Mapping[str, Any], device: Device) -> str | None:
    """The reason why results are not of this device, or None."""
    gpu = provenance.get("device")
    if device.gpu is not None:
        named = device.gpu in re.split(r"\W+", str(gpu))
        return None if named else f"those of {gpu or provenance.get('cpu')}"
    if gpu not in (None, "cpu"):
        return f"those of {gpu}"
    here = (machine.cpu_model(), isa(), torch.get_num_threads())
    there = tuple(provenance.get(name) for name in ("cpu", "isa", "threads"))
    if there == here:
        return None
    return "{}, {}, {} threads; here is {}, {}, {} threads".format(*there, *here)


def observations(read: results.Results, device: Device) -> list[Observation]:
    """The measured TopK steps of ours in results, each with its work by unit."""
    found = []
    for record in results.measured(read.records):
        kind = (record["provider"], record.get("operation"), record.get("architecture", "topk"))
        sizes: list[Any] = [record.get(name) for name in "BDFK"]
        B, D, F, K = sizes
        whole = all(type(size) is int and size >= 1 for size in sizes) and K <= F
        if not whole or record["dtype"] not in _PRODUCTS or kind != ("ours", "step", "topk"):
            continue
        problem, work = Problem(D, F, K, batch=B, dtype=record["dtype"]), dict[str, float]()
        for _, unit, amount in amounts(problem, Layout(1, 1), device):
            if amount:
                work[unit] = work.get(unit, 0.0) + amount
        found.append(Observation(work, record["median_ms"] / 1e3))
    return found


def _measured_rates(read: results.Results) -> dict[str, float]:
    """The rates of copies and products that a run measured, by unit."""
    copy, products = results.roofs(read)
    found = {"moved": copy, **{dtype: products.get(dtype, 0.0) for dtype in _PRODUCTS}}
    return {unit: rate for unit, rate in found.items() if rate > 0}


def fit(
    seen: Sequence[Observation], nominal: Mapping[str, float], pull: float = PULL
) -> dict[str, float]:
    """Fits rates to measured steps by least squares; infinite for a unit that costs nothing.

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
    units = [(unit, nominal[unit]) for unit in names]
    shares = [[s.amounts.get(u, 0.0) / rate / s.seconds for u, rate in units] for s in seen]
    rows = np.vstack([np.array(shares), pull * np.eye(len(names))])
    aims = np.concatenate([np.ones(len(seen)), np.full(len(names), pull)])
    times = zip(units, map(float, _nonnegative(rows, aims)), strict=True)
    return {u: rate / time if time > 0 else float("inf") for (u, rate), time in times}


def _nonnegative(rows: np.ndarray, aims: np.ndarray) -> np.ndarray:
    """Nonnegative least squares: the best solution over all subsets of positive coefficients.

    There are few units, so that all sets can be tried.
    """
    best, least = np.zeros(rows.shape[1]), float(aims @ aims)
    for chosen in itertools.product((False, True), repeat=rows.shape[1]):
        tried = np.zeros_like(best)
        tried[list(chosen)] = np.linalg.lstsq(rows[:, chosen], aims, rcond=None)[0]
        error = float(np.square(rows @ tried - aims).sum())
        if error < least and (tried >= 0).all():
            best, least = tried, error
    return best
