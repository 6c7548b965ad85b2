"""Tables of benchmark cases, for terminals, HTML and Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.bench.contestants.clock import PHASES
from sae_kernels.bench.output.ratios import as_shipped, headline, over_library, same_dtype
from sae_kernels.bench.results import Record, Results, measured
from sae_kernels.plotting import tables
from sae_kernels.plotting.tables import Column, say
from sae_kernels.plotting.units import number, percent, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


LEGEND = (
    "x: how many times as fast ours is, in the same dtype, and as it comes against each library as "
    "it comes. * marks the row to quote: in our default dtype where it could be measured. Beside "
    "medians up to 5 ms stands the interval that p20 and p80 allow."
)


def dtype(record: Record) -> str:
    """The short name of a record's dtype."""
    name: str = record["dtype"]
    return _DTYPES.get(name, name)


class CaseTable(NamedTuple):
    """The tables and remarks of a case."""

    name: str
    who: list[Column]  # provider and dtype of each measured record; a star is at those to be quoted
    columns: list[Column]  # how long each took, how many times as fast ours is, what each used
    phases: list[Column]  # provider, dtype and milliseconds of each phase; none if none was split
    # Those without a time and their reasons, then what accelerated ones left, a line each.
    remarks: list[str]


def cases(results: Results) -> list[CaseTable]:
    """The tables of all cases of a run."""
    return [
        CaseTable(
            name,
            who(measured(records), headline(records)),
            _columns(records),
            _phases([record for record in measured(records) if record.get("phases_ms")]),
            [
                f"{record['provider']} {dtype(record)} {record['status']}: {_reason(record)}"
                for record in records
                if not measured([record])
            ]
            + [remark for record in measured(records) for remark in _left(record)],
        )
        for name, records in results.cases().items()
    ]


def who(records: list[Record], starred: list[Record]) -> list[Column]:
    """Provider and dtype of records, with a star at those to quote."""
    marked = {id(record) for record in starred}
    names = [("* " if id(r) in marked else "  ") + r["provider"] for r in records]
    return [Column("  provider", names, True), Column("dtype", [dtype(r) for r in records], True)]


def _columns(records: list[Record]) -> list[Column]:
    """The columns of times, ratios and rates, without empty ones."""
    cells: dict[str, Callable[[Record], str]] = {
        "median ms": lambda r: number(r["median_ms"]),
        "p20 to p80": lambda r: f"{number(r['p20_ms'])} to {number(r['p80_ms'])}",
        "ours,\nsame dtype": lambda r: str(same_dtype(r, records) or ""),
        "ours,\nas shipped": lambda r: str(as_shipped(r, records) or ""),
        "times as fast\nas alone": lambda r: str(over_library(r, records) or ""),
        "peak": lambda r: _if(r, "peak_bytes", size),
        "GB/s": lambda r: _if(r, "gbps", number),
        "GFLOP/s": lambda r: _if(r, "gflops", number),
        "roofline": lambda r: _if(r, "of_roofline", lambda x: percent(x, 2)),
        "max error": lambda r: _if(r, "max_error", lambda x: f"{x:.1e}"),
    }
    columns = [Column(name, [text(r) for r in measured(records)]) for name, text in cells.items()]
    return [column for column in columns if any(column.cells)]


def _left(record: Record) -> list[str]:
    """What an accelerated library's turns had that did not run on the kernels."""
    calls = record.get("calls")
    if not calls:
        return []
    who = f"{record['provider']} {dtype(record)}"
    found = [] if calls.get("taken") else [f"{who}: nothing ran on the kernels"]
    for kind, words in (("left", "ran as shipped"), ("dense", "made dense for")):
        if counts := calls.get(kind):
            each = "; ".join(f"{n} x {text}" for text, n in counts.items())
            found.append(f"{who} {words}: {each}")
    return found


def _phases(split: list[Record]) -> list[Column]:
    if not split:
        return []
    provider = Column("provider", [r["provider"] for r in split], True)
    known = [p for p in PHASES if any(p in r["phases_ms"] for r in split)]
    known += sorted({p for r in split for p in r["phases_ms"]} - set(PHASES))
    times = [Column(phase, [_if(r["phases_ms"], phase, number) for r in split]) for phase in known]
    return [provider, Column("dtype", [dtype(r) for r in split], True), *times]


def libraries(provenance: Record) -> list[tuple[str, str]]:
    """The providers' packages and torch versions, each with its differences from a plain step."""
    found = provenance.get("libraries")
    names: dict[str, list[str]] = {}
    for name, about in (found if isinstance(found, dict) else {}).items():
        known = about if isinstance(about, dict) else {}
        package, torch = str(known.get("package") or ""), f"torch {known.get('torch')}"
        beside = torch if known.get("torch") and torch != package else ""
        text = ", ".join(filter(None, (package, beside, str(known.get("differs") or ""))))
        names.setdefault(text, []).append(str(name))
    return [(", ".join(same), text) for text, same in names.items()]


def show(results: Results, console: Console) -> None:
    """Prints every case: times, ratios, memory, achieved rates and phases."""
    say(console, machine(results.provenance))
    say(console, LEGEND)
    for case in cases(results):
        console.print()
        say(console, case.name, "bold")
        if case.columns:
            tables.show(case.who, case.columns, console)
        if case.phases:
            console.print()
            say(console, "phases, ms")
            tables.show(case.phases[:2], case.phases[2:], console)
        for line in case.remarks:
            say(console, line)
    for note in results.notes or ([] if results.records else ["nothing was measured"]):
        say(console, note)


def machine(provenance: Record) -> str:
    """The machine and software versions in one line."""
    named = ("isa", "threads", "python", "torch", "triton", "commit")
    place = [str(provenance[name]) for name in ("device", "cpu") if provenance.get(name)]
    facts = [f"{name} {provenance[name]}" for name in named if provenance.get(name)]
    limits = provenance.get("isa_limits")
    facts += [
        f"{name}={value}" for name, value in (limits if isinstance(limits, dict) else {}).items()
    ]
    return ", ".join([*place, *facts]) + (" with changes" if provenance.get("dirty") else "")


def _reason(record: Record) -> str:
    return " ".join(str(record.get("reason") or "no reason was given").split())


def _if(record: Record, name: str, text: Callable[[float], str]) -> str:
    return "" if record.get(name) is None else text(record[name])
