"""Selecting the records of a run that belong in a picture."""

from __future__ import annotations

import math

from sae_kernels.bench.output.cells import dtype
from sae_kernels.bench.output.ratios import RATES, default, headline
from sae_kernels.bench.results import Record, Results, measured

Lines = dict[str, list["Record"]]
"""Records of each provider in the order of an axis; at least two of each."""

_SAME = ("operation", "mode", "architecture", "popularity", "B", "D", "F", "K")
_LABELS = {"ours": "sae-kernels", "dense": "dense", "dense_compile": "dense, compiled",
           "product": "the product alone", "cusparse": "cuSPARSE"}  # fmt: skip


def label(record: Record) -> str:
    """The name of a provider in pictures."""
    name: str = record["provider"]
    return f"{_LABELS.get(name, name)} {dtype(record)}"


def title(record: Record) -> str:
    """The operation of a record and its sizes."""
    sizes = ", ".join(f"{name} {record[name]:,}" for name in "BDFK" if record.get(name))
    return f"{what(record)}: {sizes}"


def what(record: Record) -> str:
    """The operation of a record in words."""
    mode, operation = record.get("mode"), record.get("operation")
    if operation == "step":
        return "Training step"
    return f"{operation}, {mode}" if operation else str(record["case"])


def lines(results: Results, axis: str, value: str = "median_ms") -> Lines:
    """The records in which only one size ("B", "F" or "K") varies, by label.

    Of several such sweeps the one with most sizes, of those the first, but training steps before
    anything else. Empty if there is none. Only records with the value are taken.
    """
    sweeps: dict[tuple[object, ...], list[Record]] = {}
    for records in results.cases().values():
        for record in headline(records):
            if all((record.get(name) or 0) > 0 for name in ("B", axis, value)):
                same = tuple(record.get(name) for name in _SAME if name != axis)
                sweeps.setdefault(same, []).append(record)
    found = [_by_label(records, axis) for records in sweeps.values()]
    return max(filter(None, found), key=lambda sweep: _interest(sweep, axis), default={})


def crossing(results: Results) -> tuple[str, Lines]:
    """The axis (K, else F, else B) along which ours and dense ran in one dtype, and both lines.

    The first line is ours.
    """
    for axis in ("K", "F", "B"):
        found = lines(results, axis)
        mine = {name: rs for name, rs in found.items() if rs[0]["provider"] == "ours"}
        beside = {(r[axis], r["dtype"]) for records in mine.values() for r in records}
        dense: Lines = {}
        for name, records in found.items():
            both = [r for r in records if (r[axis], r["dtype"]) in beside]
            if records[0]["provider"] in ("dense", "dense_compile") and len(both) > 1:
                dense[name] = both
        if len(mine) == 1 and dense:
            return axis, {**mine, **dense}
    return "", {}


def showpiece(results: Results) -> list[Record]:
    """The measured records of the case to show first: the training step most libraries ran.

    Of equals the largest product. Of the rates the product in our default dtype is with them.
    Empty if no case has two records of which one is ours.
    """
    found = []
    for records in results.cases().values():
        if base := default(records):
            kept = ("product", base["dtype"])
            each = ((r, (r["provider"], r["dtype"])) for r in measured(records))
            found.append([r for r, who in each if who[0] not in RATES or who == kept])
    return max((several for several in found if len(several) > 1), key=_worth, default=[])


def split(results: Results) -> list[Record]:
    """The records with phases of the case that has most of them."""
    found = [
        [r for r in headline(records) if len(r.get("phases_ms") or {}) > 1]
        for records in results.cases().values()
    ]
    return max(found, key=lambda rs: (len(rs), _worth(rs) if rs else ()), default=[])


def _by_label(records: list[Record], axis: str) -> Lines:
    found: Lines = {}
    for record in sorted(records, key=lambda r: float(r[axis])):
        found.setdefault(label(record), []).append(record)
    return {name: rs for name, rs in found.items() if len({r[axis] for r in rs}) > 1}


def _interest(sweep: Lines, axis: str) -> tuple[bool, int, int]:
    sizes = {r[axis] for rs in sweep.values() for r in rs}
    first = next(iter(sweep.values()))[0]
    return first.get("operation") == "step", len(sizes), len(sweep)


def _worth(records: list[Record]) -> tuple[bool, int, float]:
    first = records[0]
    providers = {record["provider"] for record in records}
    product = float(math.prod(first.get(size) or 0 for size in "BDF"))
    return first.get("operation") == "step", len(providers), product
