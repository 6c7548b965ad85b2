"""Ratios of times to ours, with intervals from their 20th and 80th percentiles."""

from __future__ import annotations

from typing import NamedTuple

from sae_kernels.bench.results import Record, measured
from sae_kernels.plotting.units import number

SHORT_MS = 5.0
"""Up to here a median wanders by more than a tenth from run to run: its ratios are intervals."""

RATES = ("product", "copy")
"""Providers that say how fast the machine is: they do a part of a case, or none."""


class Ratio(NamedTuple):
    """The ratio of two times, with its interval."""

    value: float  # of the medians
    low: float  # the least and the largest that their p20 and p80 allow
    high: float
    short: bool  # one of the medians is too short for the value alone to be said

    def __str__(self) -> str:
        if self.short:
            return f"{number(self.low, 2)} to {number(self.high, 2)}x"
        return f"{number(self.value)}x"


def ratio(record: Record, base: Record) -> Ratio:
    """The time of a record divided by that of another; above 1 the other is faster.

    Example:
        >>> theirs = {"median_ms": 8.0, "p20_ms": 6.0, "p80_ms": 9.0}
        >>> ours = {"median_ms": 4.0, "p20_ms": 3.0, "p80_ms": 5.0}
        >>> ratio(theirs, ours)
        Ratio(value=2.0, low=1.2, high=3.0, short=True)
        >>> str(ratio(theirs, theirs)), str(ratio(theirs, ours))
        ('1.00x', '1.2 to 3.0x')
    """
    return Ratio(
        record["median_ms"] / base["median_ms"],
        record["p20_ms"] / base["p80_ms"],
        record["p80_ms"] / base["p20_ms"],
        min(record["median_ms"], base["median_ms"]) <= SHORT_MS,
    )


def ours(records: list[Record], dtype: str) -> Record | None:
    """Our own measured record of a case in a dtype."""
    return next(
        (r for r in measured(records) if (r["provider"], r["dtype"]) == ("ours", dtype)), None
    )


def default(records: list[Record]) -> Record | None:
    """Our own measured record of a case in the dtype that this machine gets by default."""
    found = [r for r in measured(records) if r["provider"] == "ours"]
    return next((r for r in found if r.get("as_shipped")), found[0] if found else None)


def same_dtype(record: Record, records: list[Record]) -> Ratio | None:
    """The ratio of a record's time to ours in the same dtype; None for a machine rate."""
    base = ours(records, record["dtype"])
    return ratio(record, base) if base and _comparable(record) else None


def as_shipped(record: Record, records: list[Record]) -> Ratio | None:
    """The ratio of a library's time to ours, both in their default dtypes."""
    base = default(records)
    shipped = _comparable(record) and record.get("as_shipped")
    return ratio(record, base) if base and shipped else None


def over_library(record: Record, records: list[Record]) -> Ratio | None:
    """How many times as fast an accelerated library is as the library alone, in the same dtype."""
    library, plus, _ = record["provider"].partition("+ours")
    alone = (
        r for r in measured(records) if (r["provider"], r["dtype"]) == (library, record["dtype"])
    )
    base = next(alone, None)
    return ratio(base, record) if plus and base else None


def headline(records: list[Record]) -> list[Record]:
    """The record to quote for each provider.

    It is the one in our default dtype; without it one in another dtype in which ours ran too.
    """
    base = default(records)

    def fitness(record: Record) -> int:
        same = base is not None and record["dtype"] == base["dtype"]
        return 2 if same else int(ours(records, record["dtype"]) is not None)

    found: dict[str, Record] = {}
    for record in filter(_comparable, records):
        best = found.setdefault(record["provider"], record)
        found[record["provider"]] = max(best, record, key=fitness)
    return list(found.values())


def _comparable(record: Record) -> bool:
    return record["provider"] not in RATES and bool(measured([record]))
