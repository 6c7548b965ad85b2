"""Comparing two runs: changes that exceed the noise of their times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_kernels.bench.output.cells import who
from sae_kernels.bench.output.ratios import Ratio, ratio, same_dtype
from sae_kernels.bench.results import Key, Record, Results, key, measured
from sae_kernels.plotting import tables
from sae_kernels.plotting.tables import Column, say
from sae_kernels.plotting.units import number

if TYPE_CHECKING:
    from rich.console import Console

NOISE = 1.1
"""Two runs of the same code on the same machine agree within this factor."""

_MACHINE = ("cpu", "device", "isa", "threads", "malloc", "torch", "triton", "cupy")


@dataclass(frozen=True)
class Change:
    """The change of one record (case, provider, dtype) between two runs."""

    now: Record
    stored: Record
    time: Ratio  # the present time by the stored one; above 1 it became slower
    speedup: tuple[Ratio, Ratio] | None  # how many times as fast ours is, same dtype, now and then
    # By more than the noise and than p20 and p80 allow; of the times on the same machine, of the
    # speedups between two that differ.
    changed: bool


@dataclass(frozen=True)
class Comparison:
    """The records of two runs, matched by case, provider and dtype."""

    rows: list[Change]  # what both measured
    only_now: dict[Key, str]  # what one of them did not measure, with its status there if any
    only_stored: dict[Key, str]
    differs: list[str]  # what of machine and libraries is not the same, as "threads 2, was 4"


def compare(now: Results, stored: Results) -> Comparison:
    """Matches two runs by case, provider and dtype."""
    differs = [
        f"{name} {now.provenance.get(name)}, was {stored.provenance.get(name)}"
        for name in _MACHINE
        if now.provenance.get(name) != stored.provenance.get(name)
    ]
    new, old = ({key(r): r for r in measured(run.records)} for run in (now, stored))
    rows = []
    for k in (k for k in new if k in old):
        record = new[k]
        before = same_dtype(old[k], stored.cases()[k[0]])
        beside = same_dtype(record, now.cases()[k[0]])
        speedup = (beside, before) if beside and before else None
        compared = speedup if differs else (_time(record), _time(old[k]))
        changed = compared is not None and _apart(*compared)
        rows.append(Change(record, old[k], ratio(record, old[k]), speedup, changed))
    return Comparison(rows, _only(new, old, stored), _only(old, new, now), differs)


def _only(one: dict[Key, Record], other: dict[Key, Record], run: Results) -> dict[Key, str]:
    """The records that only one of two runs measured, with the other's status."""
    status = {key(r): str(r["status"]) for r in run.records}
    return {k: status.get(k, "absent") for k in one if k not in other}


def show(now: Results, stored: Results, console: Console) -> None:
    """Prints how a run differs from a stored one; a star marks what changed."""
    found = compare(now, stored)
    if found.differs:
        differs = "; ".join(found.differs)
        say(console, f"not the same machine or torch ({differs}): only ratios mean much")
    for case in now.cases():
        rows = [row for row in found.rows if row.now["case"] == case]
        if rows:
            console.print()
            say(console, case, "bold")
            starred = [row.now for row in rows if row.changed]
            tables.show(who([row.now for row in rows], starred), _columns(rows), console)
    starred = [row.now for row in found.rows if row.changed]
    console.print()
    n = f"{len(starred)} of {len(found.rows)}"
    say(console, f"* {n} changed: by more than 10 % and than p20 to p80")
    for when, missing in (("now", found.only_now), ("in the stored run", found.only_stored)):
        for (case, provider, kind), status in missing.items():
            say(console, f"measured only {when}: {case} {provider} {kind} (the other: {status})")


def _time(record: Record) -> Ratio:
    return Ratio(record["median_ms"], record["p20_ms"], record["p80_ms"], False)


def _apart(a: Ratio, b: Ratio) -> bool:
    """Whether two ratios differ by more than the noise and their intervals are disjoint."""
    disjoint = a.low > b.high or b.low > a.high
    return disjoint and not 1 / NOISE <= a.value / b.value <= NOISE


def _columns(rows: list[Change]) -> list[Column]:
    speedups = [row.speedup for row in rows]
    return [
        Column("median ms", [number(row.now["median_ms"]) for row in rows]),
        Column("was", [number(row.stored["median_ms"]) for row in rows]),
        Column("change", [_percent(row.time.value) for row in rows]),
        Column("ours x", [str(s[0]) if s else "" for s in speedups]),
        Column("was", [str(s[1]) if s else "" for s in speedups]),
        Column("change", [_percent(s[0].value / s[1].value) if s else "" for s in speedups]),
    ]


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):+.1f} %"
