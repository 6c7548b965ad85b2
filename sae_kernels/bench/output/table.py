"""Results as tables on a terminal, as wide as it is: what does not fit goes below, uncut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.bench.output import cells

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sae_kernels.bench.results import Record, Results


def show(results: Results, console: Console) -> None:
    """Prints every case: times and ratios, what was used and achieved, and the phases."""
    say(console, machine(results.provenance))
    say(console, cells.LEGEND)
    for case in cells.cases(results):
        console.print()
        say(console, case.name, "bold")
        if case.columns:
            print_columns(case.who, case.columns, console)
        if case.phases:
            console.print()
            say(console, "phases, ms")
            print_columns(case.phases[:2], case.phases[2:], console)
        for line in case.remarks:
            say(console, line)
    for note in results.notes or ([] if results.records else ["nothing was measured"]):
        say(console, note)


def machine(provenance: Record) -> str:
    """The machine and what ran on it, in a line."""
    named = ("isa", "threads", "python", "torch", "triton", "commit")
    place = [str(provenance[name]) for name in ("device", "cpu") if provenance.get(name)]
    facts = [f"{name} {provenance[name]}" for name in named if provenance.get(name)]
    return ", ".join([*place, *facts]) + (" with changes" if provenance.get("dirty") else "")


def columns_table(columns: list[cells.Column]) -> Table:
    """Columns as a table that folds cells where the terminal is too narrow, and cuts none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        # Words in brackets in a stranger's file are not to be taken for markup.
        heading = Text(column.heading)
        table.add_column(heading, justify="left" if column.words else "right", overflow="fold")
    for row in cells.rows(columns):
        table.add_row(*map(Text, row), style="bold" if row[0].startswith("* ") else None)
    return table


def say(console: Console, line: str, style: str = "") -> None:
    """A line as it is, wrapped at words."""
    from rich.text import Text

    console.print(Text(line, style, overflow="fold"))


def print_columns(who: list[cells.Column], columns: list[cells.Column], console: Console) -> None:
    """One table where the terminal is wide enough, otherwise several that begin alike."""
    part: list[cells.Column] = []
    for column in columns:
        if part and _width([*who, *part, column], console) > console.width:
            console.print(columns_table([*who, *part]), "")
            part = []
        part.append(column)
    console.print(columns_table([*who, *part]))


def _width(columns: list[cells.Column], console: Console) -> int:
    from rich.measure import Measurement

    unbounded = console.options.update(width=10_000)
    return Measurement.get(console, unbounded, columns_table(columns)).maximum
