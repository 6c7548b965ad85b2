"""Writes docs/benchmarks.md from benchmarks/results: ``python -m benchmarks.page``."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from benchmarks import study
from benchmarks.study import DOCS, RESULTS, Record, commit
from sae_kernels.bench.output import cells, pictures, race
from sae_kernels.bench.results import read
from sae_kernels.plotting.tables import Column, markdown, rows
from sae_kernels.runs.metrics import read_metrics

if TYPE_CHECKING:
    from pathlib import Path

PAGE, PICTURES = DOCS / "benchmarks.md", DOCS / "pictures"

HEAD = """# Benchmarks

Written by `python -m benchmarks.page` from `benchmarks/results/`; do not edit. Each file is a run.
Contestants take turns every round, figures are medians with the 20th and 80th percentile, and only
the ratios within a case mean something. Files called bench-... are of `sae-kernels bench`, each
contestant in a process of its own ([benchmarking.md](benchmarking.md)). The others are of a single
process; P in them is `torch.mm(x_bf16, W_bf16.t(), out=preallocated)`, the one product that is
necessary. The dense steps are in `sae_kernels/testing/dense_steps.py`.
"""


def section(path: Path) -> str:
    """A results file of a study as Markdown."""
    facts, records = study.read(path)
    versions = f"Python {facts['python']}, torch {facts['torch']}, allocator {facts['malloc']}"
    about = (
        f"{facts['cpu']}, ISA {facts['isa']}, {facts['threads']} threads, {versions}, "
        f"{commit(facts)}: `{facts['command']}`"
    )
    groups = itertools.groupby(records, key=lambda record: record["case"])
    tables = [table(case, list(group)) for case, group in groups]
    return "\n\n".join([f"## {path.stem}", about, *tables])


def table(case: str, records: list[Record]) -> str:
    """One case as a table."""
    head = [case, "median ms", "p20 to p80", f"ratio to {records[0]['base']}"]
    cell = "{provider}|{median_ms:.1f}|{p20_ms:.1f} to {p80_ms:.1f}|{ratio:.2f}"
    if "host_ms" in records[0]:  # on a GPU: what queueing the work takes, which is not in its time
        head.append("host ms")
        cell += "|{host_ms:.2f}"
    return markdown(head, (cell.format(**r).split("|") for r in records))


def bench_section(path: Path) -> str:
    """A file that ``sae-kernels bench`` wrote, as Markdown."""
    results = read(path)
    facts = results.provenance
    blocks = [
        f"## {path.stem}",
        f"{cells.machine(facts)}, {str(facts.get('time'))[:10]}: `{facts.get('command')}`",
        cells.LEGEND.replace("*", "\\*"),
    ]
    libraries = cells.libraries(facts)
    blocks.append("\n".join(f"- {names}: {_plain(about)}" for names, about in libraries))
    for case in cells.cases(results):
        tables = filter(None, (case.who + case.columns, case.phases))
        blocks += [f"### {case.name}", *map(_markdown, tables)]
        blocks.append("\n".join(f"- {_plain(line)}" for line in case.remarks))
    return "\n\n".join(filter(None, blocks))


def race_section(path: Path, pictures_folder: Path = PICTURES) -> str:
    """A file that ``sae-kernels bench --race`` wrote, as Markdown; draws its picture."""
    lines = read_metrics(path)
    facts = {k: v for line in lines for k, v in line.get("provenance", {}).items()}
    records = [line for line in lines if "provenance" not in line]
    head, *rows = race.table(records)
    race.draw(records, pictures_folder / f"{path.stem}.png")
    about = f"{cells.machine(facts)}, {str(facts.get('time'))[:10]}: `{facts.get('command')}`"
    picture = f"![{path.stem}]({pictures_folder.name}/{path.stem}.png)"
    return "\n\n".join([f"## {path.stem}", about, picture, markdown(head, rows, words=2)])


def _markdown(columns: list[Column]) -> str:
    plain = [[_plain(cell.strip()) for cell in row] for row in rows(columns)]
    heads = [" ".join(column.heading.split()) for column in columns]
    return markdown(heads, plain, words=sum(column.words for column in columns)) if plain else ""


def _plain(words: str) -> str:
    """Text that Markdown takes for nothing else."""
    for sign in ("\\", "|", "*", "<", "["):
        words = words.replace(sign, f"\\{sign}")
    return words


def text(folder: Path, pictures_folder: Path = PICTURES) -> str:
    """The page, from the results on CPUs in a folder; those on GPUs have a page of their own."""
    sections = [race_section(path, pictures_folder) for path in sorted(folder.glob("race-*.jsonl"))]
    sections += [bench_section(path) for path in _bench_files(folder)]
    sections += [section(path) for path in sorted(folder.glob("cpu-*.jsonl"))]
    shown = (
        f"![{path.stem.removeprefix('bench-')}]({pictures_folder.name}/{path.name})"
        for path in sorted(pictures_folder.glob("bench-*.png"))
    )
    return "\n\n".join([HEAD.strip(), *shown, *sections]) + "\n"


def _bench_files(folder: Path) -> list[Path]:
    """Files of the bench command, each machine's own file before its further ones."""
    return sorted(folder.glob("bench-*.jsonl"), key=lambda path: path.stem)


def draw(folder: Path, pictures_folder: Path) -> None:
    """Draws what the bench results allow, each picture from the first file that has it."""
    drawn: dict[str, bytes] = {}
    for path in _bench_files(folder):
        drawn = {f"bench-{p.name}.png": p.png for p in pictures.draw(read(path))} | drawn
    for name, png in drawn.items():
        (pictures_folder / name).write_bytes(png)


def main() -> None:
    """Draws the pictures and writes the page."""
    PICTURES.mkdir(exist_ok=True)
    draw(RESULTS, PICTURES)
    PAGE.write_text(text(RESULTS))


if __name__ == "__main__":
    main()
