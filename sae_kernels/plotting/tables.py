"""Tables of text cells for the terminal, Markdown or an HTML page (macros.html)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table


class Column(NamedTuple):
    """A column of a table: heading (one or two lines), cells, and whether they are words."""

    heading: str
    cells: list[str]
    words: bool = False


def rows(columns: list[Column]) -> list[tuple[str, ...]]:
    """Transposes columns to rows of cells."""
    return list(zip(*(column.cells for column in columns), strict=True))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; columns after the first ``words`` hold numbers and are right-aligned.

    >>> print(markdown(["who", "ms"], [["ours", "1.0"]]))
    | who | ms |
    |---|---:|
    | ours | 1.0 |
    """
    rule = "|" + "".join("---|" if i < words else "---:|" for i in range(len(head)))
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def say(console: Console, line: str, style: str = "") -> None:
    """Prints a line without markup, wrapped at words."""
    from rich.text import Text

    console.print(Text(line, style, overflow="fold"))


def show(first: list[Column], others: list[Column], console: Console) -> None:
    """Prints a table, split into several with the same first column if the terminal is narrow.

    No cell is cut. A row that begins with a star is bold.
    """
    part: list[Column] = []
    for column in others:
        if part and _width([*first, *part, column], console) > console.width:
            console.print(_table([*first, *part]), "")
            part = []
        part.append(column)
    console.print(_table([*first, *part]))


def _table(columns: list[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        # Words in brackets in a stranger's file are not to be taken for markup.
        heading = Text(column.heading)
        table.add_column(heading, justify="left" if column.words else "right", overflow="fold")
    for row in rows(columns):
        table.add_row(*map(Text, row), style="bold" if row[0].startswith("* ") else None)
    return table


def _width(columns: list[Column], console: Console) -> int:
    from rich.measure import Measurement

    unbounded = console.options.update(width=10_000)
    return Measurement.get(console, unbounded, _table(columns)).maximum
