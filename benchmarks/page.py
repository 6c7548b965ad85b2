"""Writes docs/benchmarks.md from benchmarks/results: ``python -m benchmarks.page``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Written by `python -m benchmarks.page` from `benchmarks/results/`; do not edit. Each file is one run
of one process: contestants take turns every round, figures are medians with the 20th and 80th
percentile, and only the ratios within a case mean something. P is
`torch.mm(x_bf16, W_bf16.t(), out=preallocated)`, the one product that is necessary; the dense steps
are in `benchmarks/baselines.py`.
"""


def section(path: Path) -> str:
    """One results file as Markdown."""
    first, *records = (json.loads(line) for line in path.read_text().splitlines())
    facts = first["provenance"]
    versions = f"Python {facts['python']}, torch {facts['torch']}"
    lines = [
        f"## {path.stem}",
        "",
        f"{facts['cpu']}, ISA {facts['isa']}, {facts['threads']} threads, {versions}, "
        f"allocator {facts['malloc']}, commit {facts['commit']}"
        f"{' with changes' if facts['dirty'] else ''}, {facts['time'][:10]}: "
        f"`{facts['command']}`",
    ]
    for case, group in itertools.groupby(records, key=lambda record: record["case"]):
        lines += ["", *table(case, list(group))]
    return "\n".join(lines)


def table(case: str, records: list[dict[str, Any]]) -> list[str]:
    """One case as a table."""
    return [
        f"| {case} | median ms | p20 to p80 | ratio to {records[0]['base']} |",
        "|---|---:|---:|---:|",
        *(
            f"| {r['provider']} | {r['median_ms']:.1f} | {r['p20_ms']:.1f} to {r['p80_ms']:.1f} "
            f"| {r['ratio']:.2f} |"
            for r in records
        ),
    ]


def text(folder: Path) -> str:
    """The page, from the results on CPUs in a folder; those on GPUs have a page of their own."""
    sections = [section(path) for path in sorted(folder.glob("cpu-*.jsonl"))]
    return "\n\n".join([HEAD.strip(), *sections]) + "\n"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(text(RESULTS))


if __name__ == "__main__":
    main()
