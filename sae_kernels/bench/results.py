"""Benchmark results as JSON lines: the provenance, then a record for each provider.

A record is one provider's measurement of one case in one dtype. ``status`` says whether it was
measured; if not, ``reason`` says why. Missing numbers are null. Later lines of provenance add to
the first.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_kernels.bench.contestants.rates import COPIED_BYTES
from sae_kernels.errors import DataError
from sae_kernels.runs.metrics import MetricLog

Record = dict[str, Any]
Key = tuple[str, str, str]

_TEXTS = ("case", "provider", "dtype", "status")
_KINDS = ("operation", "mode", "architecture", "popularity")
_TIMES = ("median_ms", "p20_ms", "p80_ms")
_NUMBERS = (
    *_TIMES,
    *("B", "D", "F", "K", "peak_bytes", "max_error", "error_budget", "gflops", "gbps"),
    *("of_roofline", "floor_ms", "speedup_of_ours", "speedup_of_ours_default"),
    "speedup_of_library",
)


@dataclass(frozen=True)
class Results:
    """The results of one run of the benchmark.

    Attributes:
        provenance: where, how and with what it was measured.
        records: in the order of the file.
        notes: what a reader should know of the file, a sentence each.
    """

    provenance: Record
    records: list[Record]
    notes: list[str] = field(default_factory=list)

    def cases(self) -> dict[str, list[Record]]:
        """The records of each case, in the order in which the cases first appear."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            found.setdefault(record["case"], []).append(record)
        return found


def key(record: Record) -> Key:
    """The key of a record in its file: case, provider and dtype."""
    return record["case"], record["provider"], record["dtype"]


def measured(records: list[Record]) -> list[Record]:
    """The records that have a time."""
    return [r for r in records if r["status"] == "measured" and r.get("median_ms")]


def roofs(results: Results) -> tuple[float, dict[str, float]]:
    """Measured roofs: bytes/s of copies, read plus written (0: unknown), and FLOP/s by dtype.

    The best of the run.
    """
    copy, products = 0.0, dict[str, float]()
    for record in measured(results.records):
        seconds = record["median_ms"] / 1e3
        if record["provider"] == "copy":
            copy = max(copy, 2 * COPIED_BYTES / seconds)
        elif record["provider"] == "product":
            flops = 2.0 * math.prod(record.get(size) or 0 for size in "BDF")
            products[record["dtype"]] = max(flops / seconds, products.get(record["dtype"], 0.0))
    return copy, {name: rate for name, rate in products.items() if rate > 0}


class Writer(MetricLog):
    """Appends results to a file, each line flushed as soon as it is known.

    Whatever ends the run, what was measured until then can be read. Numbers that are not finite
    become null, which JSON lacks.

    Args:
        path: the file; one that is there is replaced.
        provenance: its first line.

    Example:
        >>> import os, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "results.jsonl"
        >>> with Writer(path, {"cpu": "this one"}) as writer:
        ...     writer.write({"case": "step", "provider": "ours", "dtype": "float32",
        ...                   "status": "unable", "reason": "no such kernel"})
        >>> read(path).records[0]["reason"]
        'no such kernel'
    """

    def __init__(self, path: str | Path, provenance: Record) -> None:
        Path(path).unlink(missing_ok=True)
        super().__init__(path)
        self.write({"provenance": provenance})


def read(path: str | Path) -> Results:
    """Reads a file of results; unknown keys are kept.

    A last line that was cut off, as a killed run leaves it, is left out and noted.

    Raises:
        DataError: the file is missing, empty, damaged or of another kind; says in which line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a file of benchmark results, got {error}") from error
    *lines, last = text.split("\n")
    notes: list[str] = []
    try:
        if last and isinstance(_parsed(last), dict):  # whole but for the end of its line
            lines.append(last)
    except ValueError:
        if last.strip() and lines:
            notes.append(f"{path}, line {len(lines) + 1} is cut off and was left out")
    if not lines:
        raise DataError(f"{path}, line 1: expected the provenance, got {_short(text)}")
    found = []
    for i, line in enumerate(lines, 1):
        try:
            found.append(_parsed(line))
            _check(found[-1], first=i == 1)
        except ValueError as error:
            raise DataError(f"{path}, line {i}: {error}") from None
    facts: Record = {}
    for line in filter(_is_provenance, found):
        facts |= line["provenance"]
    return Results(facts, [line for line in found if not _is_provenance(line)], notes)


def _is_provenance(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("provenance"), dict)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=float)
    except (ValueError, RecursionError):
        raise ValueError(f"expected a JSON object, got {_short(text)}") from None


def _check(found: Any, *, first: bool) -> None:
    """Raises DataError for a line that is neither the provenance (first) nor a record."""
    got = _short(json.dumps(found))
    if _is_provenance(found):
        return
    if first:
        wanted = '{"provenance": {...}}, as sae-kernels bench writes first,'
        raise ValueError(f"expected {wanted} got {got}")
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {got}")
    kinds: list[tuple[str, Any, str]] = [(name, str, "a text") for name in _TEXTS]
    kinds += [(name, str | None, "a text or null") for name in _KINDS]
    for name, kind, words in [*kinds, ("phases_ms", dict | None, "an object or null")]:
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{name}: expected {words}, got {_short(repr(found.get(name)))}")
    _check_calls(found.get("calls"))
    numbers = {name: found.get(name) for name in _NUMBERS}
    for name, value in {**numbers, **(found.get("phases_ms") or {})}.items():
        if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
            raise ValueError(f"{name}: expected a finite number or null, got {_short(repr(value))}")
    for name in _TIMES if found["status"] == "measured" else ():
        if not (found.get(name) or 0) > 0:
            raise ValueError(f"{name}: expected a time above 0, got {found.get(name)!r}")


def _check_calls(calls: Any) -> None:
    """Raises ValueError unless these are counts by kind and text, or None."""
    counts = list(calls.values()) if isinstance(calls, dict) else [calls]
    known = calls is None or all(
        isinstance(one, dict) and all(type(n) is int for n in one.values()) for one in counts
    )
    if not known:
        raise ValueError(f"calls: expected counts by kind or null, got {_short(repr(calls))}")


def _short(text: str) -> str:
    """The beginning of a value from a file, on one line, for messages."""
    line = " ".join(text.split())
    return (line[:40] + "..." if len(line) > 40 else line) or "nothing"
