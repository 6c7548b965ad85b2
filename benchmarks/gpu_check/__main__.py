"""``python -m benchmarks.gpu_check --out DIR --minutes 8``: see the package."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_check import bars, compared, correctness, measure, sanitizer
from sae_kernels import machine
from sae_kernels.bench import provenance
from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu_check.bench import Record

_ROOT = Path(__file__).parent.parent.parent
# Up to which share of the whole time each stage may go on; what one leaves, the next has.
STAGES = {"build": 0.2, "tests": 0.5, "sanitizer": 0.6, "measure": 0.85, "bench": 0.97}


def build(dry: bool, seconds: float) -> Iterator[Record]:
    """Installs the checkout in place, kernels included."""
    if dry:
        yield {"kind": "skipped", "what": "build", "why": "a dry run leaves the installation alone"}
        return
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-e",
        ".",
        "--no-build-isolation",
        "--no-deps",
    ]
    try:
        done = subprocess.run(
            tied(command), cwd=_ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        yield {"kind": "failed", "what": "build", "why": f"not done after {seconds:.0f} s"}
        return
    if done.returncode:
        yield {"kind": "failed", "what": "build", "why": (done.stdout + done.stderr)[-1500:]}


def measured(groups: list[str]) -> Callable[[bool, float], Iterator[Record]]:
    """The stage of the measurements."""

    def stage(dry: bool, seconds: float) -> Iterator[Record]:
        return measure.measurements(groups, dry, time.monotonic() + seconds)

    return stage


def verdict(name: str, records: list[Record]) -> tuple[str, str]:
    """What became of a stage, in a word, and why."""
    failed = [r for r in records if r["kind"] == "failed" or r.get("ok") is False]
    unfinished = [r for r in records if r.get("finished") is False]
    skipped = [r for r in records if r["kind"] in ("skipped", "not available")]
    if failed:
        return "failed", _names(failed)
    if unfinished:
        return "incomplete", _names(unfinished)
    if name == "tests" and not any(r["kind"] == "tests" and r["passed"] for r in records):
        return "failed", "not one test ran"
    if skipped:
        whole = name in ("build", "sanitizer")
        return "skipped" if whole else "passed", _names(skipped)
    return "passed", ""


def _names(records: list[Record]) -> str:
    """The first of them with its last line of reason, and how many more there are."""
    first = records[0]
    reason = str(first.get("why") or "").strip().splitlines()
    more = f"; and {len(records) - 1} more" if len(records) > 1 else ""
    return f"{first.get('what') or first.get('group')}: {reason[-1] if reason else '-'}{more}"


def summary(records: list[Record], dry: bool) -> str:
    """The short table that comes last."""
    lines = ["", "stage        outcome      seconds  about"]
    for r in records:
        if r["kind"] == "stage":
            lines.append(f"{r['what']:12} {r['outcome']:12} {r['seconds']:7.1f}  {r['why']}")
    lines += ["", "kernel               backend      passed  failed  skipped"]
    for r in records:
        if r["kind"] == "tests":
            counts = "".join(f"{r[name]:8}" for name in ("passed", "failed", "skipped"))
            lines.append(f"{r['kernel']:20} {r['backend']:10} {counts}")
    if dry:
        return "\n".join([*lines, "", "dry run: nothing was measured"])
    lines += ["", "bar (on one H200)"]
    for bar in bars.BARS:
        value = bar.value(records)
        state = "open" if value is None else f"{value:.2f} {'met' if bar.met(value) else 'MISSED'}"
        lines.append(f"{state:14} {'<=' if bar.at_most else '>='} {bar.limit:g}  {bar.text}")
    return "\n".join(lines)


def where(commit: str | None, dry: bool) -> Record:
    """The first line of the results: what ran where."""
    facts = provenance.provenance("python -m benchmarks.gpu_check")
    if not dry:
        facts |= machine.gpu(torch.device("cuda"))
    if commit:
        facts |= {"commit": commit, "dirty": None}
    return {"provenance": {**facts, "dry": dry}}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--no-build", action="store_true", help="the kernels are built already")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--groups", nargs="+", choices=measure.GROUPS, default=list(measure.GROUPS))
    parser.add_argument("--commit", help="of a copy of the tree without its .git")
    parser.add_argument("--dry", action="store_true", help="as without a GPU")
    return parser.parse_args()


def staged(options: argparse.Namespace, dry: bool) -> Iterator[Record]:
    """Every stage's records and, after them, what became of it."""
    start = time.monotonic()
    stages = {
        "build": build,
        "tests": correctness.tests,
        "sanitizer": sanitizer.sanitized,
        "measure": measured(options.groups),
        "bench": compared.compared(options.out / "bench.jsonl"),
    }
    for name, share in STAGES.items():
        begin, records = time.monotonic(), []
        if name not in options.stages or (name == "build" and options.no_build):
            outcome, why = "skipped", "left out on the command line"
        else:
            print(f"{name} ...", flush=True)
            for record in stages[name](dry, 60 * options.minutes * share - (begin - start)):
                records.append(record)
                yield record
            outcome, why = verdict(name, records)
        took = round(time.monotonic() - begin, 1)
        yield {"kind": "stage", "what": name, "outcome": outcome, "seconds": took, "why": why}


def main() -> None:
    """Runs the stages, writes DIR/gpu_check.jsonl, prints the summary."""
    options = arguments()
    dry = options.dry or not torch.cuda.is_available()
    if dry:
        why = "asked for" if options.dry else "torch finds no GPU here"
        print(f"DRY RUN ({why}): tiny shapes on the CPU, nothing is measured")
    options.out.mkdir(parents=True, exist_ok=True)
    records = []
    with (options.out / "gpu_check.jsonl").open("w") as file:
        file.write(json.dumps(where(options.commit, dry)) + "\n")
        for record in staged(options, dry):
            records.append(record)
            file.write(json.dumps({**record, "dry": True} if dry else record) + "\n")
            file.flush()
    print(summary(records, dry))
    bad = [r for r in records if r["kind"] == "stage" and r["outcome"] in ("failed", "incomplete")]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
