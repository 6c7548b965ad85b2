"""What a command writes: results to standard output, progress to standard error."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sae_kernels.runs.metrics import jsonable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Progress = Callable[[str, int, int | None], None]

_QUIET_SECONDS = 10.0  # between lines of a stage where there is no terminal


class Output:
    """Standard output as JSON lines or as text, never both."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def record(self, values: Mapping[str, Any]) -> None:
        """A line of JSON; numbers that are not finite become null, which JSON lacks."""
        if self.as_json:
            print(json.dumps(jsonable(values), allow_nan=False), flush=True)

    def text(self, *lines: str) -> None:
        """Lines for a person."""
        if not self.as_json:
            print(*lines, sep="\n")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Aligned columns; the last one is as wide as it likes, so that nothing is cut."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.text("  ".join(cells).rstrip())

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Gives a function of a stage, what is done of it and its total (None: unknown).

        Bars on a terminal, now and then a line elsewhere, nothing beside JSON.
        """
        if self.as_json:
            yield lambda stage, done, total: None
        elif sys.stderr.isatty():
            with _bars() as show:
                yield show
        else:
            yield _Lines()


class _Lines:
    def __init__(self) -> None:
        self._shown: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        first = stage not in self._shown
        if first or (0 < done != total and now - self._shown[stage] >= _QUIET_SECONDS):
            self._shown[stage] = now
            rest = "" if total is None else f" of {total:,}"
            print(stage if first else f"{stage}: {done:,}{rest}", file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
