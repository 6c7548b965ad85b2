"""A case as columns of text, whatever they are then shown in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.bench.contestants.clock import PHASES
from sae_kernels.bench.output.ratios import as_shipped, headline, same_dtype
from sae_kernels.bench.results import measured
from sae_kernels.report.units import number, percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.bench.results import Record

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


LEGEND = (
    "x: how many times as fast ours is, in the same dtype, and as it comes against each library as "
    "it comes. * marks the row to quote: in our default dtype where it could be measured. Beside "
    "medians up to 5 ms stands the interval that p20 and p80 allow."
)


class Column(NamedTuple):
    """A column: its heading, of a line or two, its cells, and whether they are words."""

    heading: str
    cells: list[str]
    words: bool = False


def dtype(record: Record) -> str:
    """The short name of its dtype."""
    name: str = record["dtype"]
    return _DTYPES.get(name, name)


def size(n_bytes: float) -> str:
    """A number of bytes with its unit.

    >>> size(3 * 2**19), size(300 * 2**30)
    ('1.50 MiB', '300 GiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 2**power:
            return f"{number(n_bytes / 2**power)} {unit}"
    return f"{number(n_bytes)} B"


def who(records: list[Record]) -> list[Column]:
    """Provider and dtype; a star is at those whose ratio is to be quoted."""
    starred = [id(record) for record in headline(records)]
    shown = measured(records)
    names = [("* " if id(r) in starred else "  ") + r["provider"] for r in shown]
    return [Column("  provider", names, True), Column("dtype", [dtype(r) for r in shown], True)]


def times(records: list[Record]) -> list[Column]:
    """How long each took, and how many times as fast ours is."""
    return _filled(
        records,
        {
            "median ms": lambda r: number(r["median_ms"]),
            "p20 to p80": lambda r: f"{number(r['p20_ms'])} to {number(r['p80_ms'])}",
            "ours,\nsame dtype": lambda r: _text(same_dtype(r, records)),
            "ours,\nas shipped": lambda r: _text(as_shipped(r, records)),
        },
    )


def work(records: list[Record]) -> list[Column]:
    """What each used and achieved."""
    return _filled(
        records,
        {
            "peak": lambda r: _if(r, "peak_bytes", size),
            "GB/s": lambda r: _if(r, "gbps", number),
            "GFLOP/s": lambda r: _if(r, "gflops", number),
            "roofline": lambda r: _if(r, "of_roofline", lambda x: percent(x, 2)),
            "max error": lambda r: _if(r, "max_error", lambda x: f"{x:.1e}"),
        },
    )


def phases(records: list[Record]) -> list[Column]:
    """Provider, dtype and milliseconds of each phase; no columns if none was split."""
    split = [record for record in measured(records) if record.get("phases_ms")]
    if not split:
        return []
    names = [Column("provider", [r["provider"] for r in split], True)]
    names.append(Column("dtype", [dtype(r) for r in split], True))
    known = [p for p in PHASES if any(p in r["phases_ms"] for r in split)]
    known += sorted({p for r in split for p in r["phases_ms"]} - set(PHASES))
    return names + [
        Column(phase, [_if(r["phases_ms"], phase, number) for r in split]) for phase in known
    ]


def libraries(provenance: Record) -> list[tuple[str, str]]:
    """Which providers are of which package and torch, and how they differ from a plain step."""
    found = provenance.get("libraries")
    names: dict[str, list[str]] = {}
    for name, about in (found if isinstance(found, dict) else {}).items():
        known = about if isinstance(about, dict) else {}
        package, torch = str(known.get("package") or ""), f"torch {known.get('torch')}"
        beside = torch if known.get("torch") and torch != package else ""
        text = ", ".join(filter(None, (package, beside, str(known.get("differs") or ""))))
        names.setdefault(text, []).append(str(name))
    return [(", ".join(same), text) for text, same in names.items()]


def remarks(records: list[Record]) -> list[str]:
    """Those without a time and their reasons, a line each."""
    return [
        f"{record['provider']} {dtype(record)} {record['status']}: {_reason(record)}"
        for record in records
        if not measured([record])
    ]


def _reason(record: Record) -> str:
    return " ".join(str(record.get("reason") or "no reason was given").split())


def _filled(records: list[Record], cells: dict[str, Callable[[Record], str]]) -> list[Column]:
    """The columns that hold anything."""
    shown = measured(records)
    columns = [Column(heading, [text(r) for r in shown]) for heading, text in cells.items()]
    return [column for column in columns if any(column.cells)]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _if(record: Record, name: str, text: Callable[[float], str]) -> str:
    return "" if record.get(name) is None else text(record[name])
