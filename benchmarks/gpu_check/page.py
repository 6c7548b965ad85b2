"""Writes the generated part of docs/gpu.md: ``python -m benchmarks.gpu_check.page``.

It says of every kernel where it last ran, or that it never has, and of every bar what was measured.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import calls
from benchmarks.gpu_check.bars import BARS
from benchmarks.page import table

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu_check.bench import Record

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "gpu.md"
MARK = "<!-- Written by `python -m benchmarks.gpu_check.page` from here on; do not edit. -->"
NEVER = "never run on a GPU"
_UNTOLD = ("time", "done", "kernels", "compiled ahead")  # in the tables, or in the file alone
# The kernels together, as a training step calls them.
_TOGETHER = ("FusedStep", "automatic")


class Result(NamedTuple):
    """A file that gpu_check wrote on a GPU."""

    name: str
    facts: dict[str, Any]
    records: list[Record]

    @property
    def where(self) -> str:
        """Device, commit and day."""
        changes = " with changes" if self.facts["dirty"] else ""
        return (
            f"{self.facts['device']} | {self.facts['commit']}{changes} | {self.facts['time'][:10]}"
        )


def read(path: Path) -> Result:
    """One file; a ValueError for what was not measured on a GPU at a known commit."""
    first, *records = (json.loads(line) for line in path.read_text().splitlines())
    facts = first["provenance"]
    if facts.get("dry") or any(record.get("dry") for record in records):
        raise ValueError(
            f"{path.name}: expected results measured on a GPU, got those of a dry run, which "
            "measures nothing; take the file out of benchmarks/results"
        )
    for needed, remedy in (("device", "run it on a GPU"), ("commit", "pass --commit")):
        if not facts.get(needed):
            raise ValueError(f"{path.name}: its provenance names no {needed}; {remedy}")
    return Result(path.stem, facts, records)


def results(folder: Path) -> list[Result]:
    """All results on GPUs, the latest first."""
    found = [read(path) for path in folder.glob("gpu-*.jsonl")]
    return sorted(found, key=lambda result: str(result.facts["time"]), reverse=True)


def emulated(folder: Path) -> dict[tuple[str, str], str]:
    """Emulated tests by kernel and backend: architecture, commit and number that passed."""
    said: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.glob("emulated-*.jsonl")):
        first, *records = (json.loads(line) for line in path.read_text().splitlines())
        for record in records:
            changes = " with changes" if record["dirty"] else ""
            where = f"{first['architecture']} at {record['commit']}{changes}"
            counts = f"{record['passed']} passed, {record['failed']} failed"
            key = (record["kernel"], record["backend"])
            if record["passed"] + record["failed"]:
                said.setdefault(key, []).append(f"{where}: {counts}")
    return {key: "; ".join(words) for key, words in said.items()}


def kernels(found: list[Result], in_emulator: dict[tuple[str, str], str]) -> list[str]:
    """Kernel by kernel, the last run that tested it."""
    lines = [
        "| kernel | backend | device | commit | day | tests passed | failed | repeats | emulated |",
        "|---|---|---|---|---|---:|---:|---|---|",
    ]
    for name, backend in [*calls.kernels(), _TOGETHER]:

        def about(record: Record, kind: str, key: tuple[str, str] = (name, backend)) -> bool:
            return record["kind"] == kind and (record["kernel"], record["backend"]) == key

        ran = _latest(found, lambda r: about(r, "tests") and r["passed"] + r["failed"] > 0)
        repeated = _latest(found, lambda r: about(r, "check") and r["what"] == "repeats")
        said = in_emulator.get((name, backend), "")
        if ran is None:
            lines.append(f"| {name} | {backend} | {NEVER} | | | | | | {said} |")
            continue
        result, _ = ran
        tests = [record for record in result.records if about(record, "tests")]
        bits = "-" if repeated is None else ("same bits" if repeated[1]["ok"] else "DIFFER")
        counts = " | ".join(str(sum(r[outcome] for r in tests)) for outcome in ("passed", "failed"))
        lines.append(f"| {name} | {backend} | {result.where} | {counts} | {bits} | {said} |")
    return lines


def bars(found: list[Result]) -> list[str]:
    """Bar by bar, the last run that says something about it."""
    lines = ["| bar | limit | measured | device | commit | day |", "|---|---:|---:|---|---|---|"]
    for bar in BARS:
        limit = f"{'at most' if bar.at_most else 'at least'} {bar.limit:g}"
        row = f"| {bar.text} | {limit} | open | | | |"
        for result in found:
            value = bar.value(result.records)
            if value is not None:
                missed = "" if bar.met(value) else " (missed)"
                row = f"| {bar.text} | {limit} | {value:.2f}{missed} | {result.where} |"
                break
        lines.append(row)
    return lines


def run(result: Result) -> list[str]:
    """Everything one run measured."""
    facts, records = result.facts, result.records
    lines = [
        f"### {result.name}",
        "",
        f"{facts['device']}, driver {facts['nvidia_smi'].get('driver_version', 'unknown')}, CUDA "
        f"{facts['cuda']}, torch {facts['torch']}, Triton {facts['triton']}: `{facts['command']}`",
        "",
        *(_line(record) for record in records if record["kind"] not in _UNTOLD),
    ]
    timed = [record for record in records if record["kind"] == "time"]
    for case, group in itertools.groupby(timed, key=lambda record: record["case"]):
        lines += ["", table(str(case), list(group))]
    return lines


def _line(record: Record) -> str:
    kind, what = record["kind"], record.get("what") or record.get("task")
    rest = {k: v for k, v in record.items() if k not in ("kind", "what", "task")}
    said = ", ".join(f"{name} {_number(v)}" for name, v in rest.items() if v not in ("", None))
    return f"- {kind}{f' {what}' if what else ''}: {said}".replace("\n", " ")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _latest(found: list[Result], fits: Callable[[Record], bool]) -> tuple[Result, Record] | None:
    return next(((r, record) for r in found for record in r.records if fits(record)), None)


def generated(folder: Path) -> str:
    """The page from the mark on."""
    found = results(folder)
    lines = [MARK, "", "## Which kernels ran where", "", *kernels(found, emulated(folder))]
    lines += ["", "## Bars, on one H200", "", *bars(found)]
    if found:
        lines += ["", "## Runs"]
        for result in found:
            lines += ["", *run(result)]
    return "\n".join(lines) + "\n"


def written(page: str, folder: Path) -> str:
    """The page with its generated part renewed; what is above the mark stays."""
    return page.partition(MARK)[0] + generated(folder)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(written(PAGE.read_text(), RESULTS))


if __name__ == "__main__":
    main()
