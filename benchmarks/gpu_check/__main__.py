"""``python -m benchmarks.gpu_check --out DIR --budget 540``: see the package."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_check import bars, dry_run
from benchmarks.gpu_check.journal import Journal, outcomes
from benchmarks.gpu_check.processes import Place
from benchmarks.gpu_check.stages import STAGES
from sae_kernels import machine
from sae_kernels.bench.provenance import without_places

if TYPE_CHECKING:
    from benchmarks.gpu_check.bench import Record


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--warm", type=Path, help="kernels compiled ahead: gpu_check.warm's file")
    parser.add_argument("--scratch", type=Path, help="for logs and caches; default OUT/scratch")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--tasks", nargs="+", default=[], help="only those whose names hold a word")
    parser.add_argument("--commit", help="of a copy of the tree without its .git")
    parser.add_argument("--dry-run", action="store_true", help="emulated, on tiny shapes")
    return parser.parse_args()


def where(commit: str | None, dry: bool) -> Record:
    """Provenance of a run, the first line of its results; needs nothing that is built later."""
    checkout, dirty = machine.checkout()
    return {
        "cpu": machine.cpu_model(),
        **machine.versions(),
        "commit": commit or checkout,
        "dirty": None if commit else dirty,
        "command": " ".join(["python -m benchmarks.gpu_check", *without_places(sys.argv[1:])]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dry": dry,
        **({} if dry else machine.gpu(torch.device("cuda"))),
    }


def summary(records: list[Record], dry: bool) -> str:
    """The text at the end of a run: outcomes, failures, hits of the kernel cache, bars."""
    counts = outcomes(records)
    lines = ["", ", ".join(f"{counts[name]} {name}" for name in counts) or "nothing ran"]
    for record in records:
        if record["kind"] == "done" and record["outcome"] in ("failed", "no time"):
            lines.append(f"{record['outcome']:8} {record['task']}: {_last_line(record['why'])}")
    kernels = [record for record in records if record["kind"] == "kernels"]
    missed = sum(len(record["compiled"]) for record in kernels)
    found = sum(record["cached"] for record in kernels)
    lines.append(f"kernels found in the cache {found}, compiled by the tasks {missed}")
    if dry:
        return "\n".join([*lines, "dry run: nothing was measured"])
    lines += ["", "bar (on one H200)"]
    for bar in bars.BARS:
        value = bar.value(records)
        state = "open" if value is None else f"{value:.2f} {'met' if bar.met(value) else 'MISSED'}"
        lines.append(f"{state:14} {'<=' if bar.at_most else '>='} {bar.limit:g}  {bar.text}")
    return "\n".join(lines)


def _last_line(why: str) -> str:
    return (why.strip().splitlines() or ["see its records"])[-1]


def main() -> None:
    """Runs the stages; exits with 0 if all that ran passed and nothing lacked time."""
    begin = time.monotonic()
    options = arguments()
    dry = options.dry_run
    if not dry and not torch.cuda.is_available():
        sys.exit("expected a GPU that torch can use, found none; --dry-run emulates one")
    if dry and dry_run.unavailable():
        sys.exit(f"--dry-run: {dry_run.unavailable()}")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        journal = Journal(options.out, where(options.commit, dry), options.resume)
    except ValueError as error:
        sys.exit(str(error))
    if journal.finished():
        print(f"{len(journal.finished())} tasks were finished before")
    scratch = options.scratch or options.out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    place = Place(
        scratch.resolve(),
        dry,
        begin + options.budget,
        frozenset(journal.finished()),
        tuple(options.tasks),
        options.warm,
        options.out.resolve(),
    )
    for name, stage in STAGES.items():
        if name in options.stages:
            print(f"{place.left():4.0f} s are left: {name}", flush=True)
            for record in stage(place):
                journal.write(record)
                if record["kind"] == "done":
                    print(f"{record['outcome']:13} {record['seconds']:6} s  {record['task']}")
    place.crew.dismiss()
    print(summary(journal.records, dry))
    sys.exit(bool({"failed", "no time"} & outcomes(journal.records).keys()))


if __name__ == "__main__":
    main()
