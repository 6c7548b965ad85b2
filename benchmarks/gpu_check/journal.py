"""The file of a run: a JSON line per finding, written out at once, and what a resumed run keeps."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.gpu_check.bench import Record

# Outcomes that a resumed run does not try again.
FINAL = ("passed", "failed", "not available")
# Of the machine, not of the kernels: a run that is resumed on another does them there too.
_PREPARATIONS = ("build", "cache")


class Journal:
    """DIR/gpu_check.jsonl: provenance first, then records.

    Attributes:
        records: all so far, without the provenance.
    """

    def __init__(self, folder: Path, provenance: dict[str, Any], resume: bool) -> None:
        self.records: list[Record] = []
        self._dry = bool(provenance["dry"])
        path = folder / "gpu_check.jsonl"
        if resume and path.exists():
            first, *found = _lines(path)
            _same(first["provenance"], provenance)
            finished = _finished(found)
            self.records = [r for r in found if r.get("task") in finished]
            provenance = first["provenance"]
        elif path.exists():
            raise ValueError(
                f"{path} is there already: pass --resume to go on with it, or another --out"
            )
        whole = path.with_suffix(".part")
        with whole.open("w") as file:
            for line in ({"provenance": provenance}, *self.records):
                file.write(json.dumps(line) + "\n")
        whole.replace(path)
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Appends a record; it survives whatever ends this process."""
        record = {**record, "dry": True} if self._dry else record
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finished(self) -> set[str]:
        """The tasks that need not run again."""
        return _finished(self.records)


def done(task: str, outcome: str, seconds: float, why: str = "") -> Record:
    """The last record of a task. Outcomes: those of `FINAL`, or "no time", to be tried again."""
    seconds = round(seconds, 1)
    return {"kind": "done", "task": task, "outcome": outcome, "seconds": seconds, "why": why}


def outcomes(records: list[Record]) -> Counter[str]:
    """The number of finished tasks by outcome."""
    return Counter(record["outcome"] for record in records if record["kind"] == "done")


def _finished(records: list[Record]) -> set[str]:
    ended = {r["task"] for r in records if r["kind"] == "done" and r["outcome"] in FINAL}
    return ended.difference(_PREPARATIONS)


def _lines(path: Path) -> list[Any]:
    """Whole lines: the last one of a run that was killed may be torn."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    if not found or "provenance" not in found[0]:
        raise ValueError(f"{path}: expected provenance in the first line; pass another --out")
    return found


def _same(then: dict[str, Any], now: dict[str, Any]) -> None:
    for what in ("commit", "device", "dry"):
        if then.get(what) != now.get(what):
            raise ValueError(
                f"--resume: the run began with {what} {then.get(what)}, and this is "
                f"{now.get(what)}; go on there, or pass another --out"
            )
