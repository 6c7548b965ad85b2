"""Terminal output of the commands: results on standard output, progress on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from sae_kernels.runs.metrics import jsonable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_QUIET_SECONDS = 10.0  # between lines of a stage where there is no terminal
_REFRESHES = 4  # of a terminal, a second
_ROOM = 110  # columns that a bar and a note need


def is_first() -> bool:
    """Whether this process speaks for those that torchrun started: it is the first, or alone."""
    return os.environ.get("RANK", "0") == "0"


class Progress(Protocol):
    """A function that shows how far a stage is, with a short note."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None: ...


class Output:
    """Writes results to standard output, either as JSON lines or as text; of ranks only the first.

    Args:
        as_json: whether as JSON lines.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def record(self, values: Mapping[str, Any]) -> None:
        """Prints a JSON object on one line if JSON was asked for; NaN and infinity become null."""
        if self.as_json and is_first():
            print(json.dumps(jsonable(values), allow_nan=False), flush=True)

    def text(self, *lines: str) -> None:
        """Prints lines unless JSON was asked for."""
        if not self.as_json and is_first():
            print(*lines, sep="\n")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Prints rows in aligned columns unless JSON was asked for; nothing is cut."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[-1] = 0
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.text("  ".join(cells).rstrip())

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Shows progress while the context is open, through the :class:`Progress` it gives.

        Bars on a terminal, an occasional line elsewhere, nothing with JSON.
        """
        if self.as_json or not is_first():
            yield lambda stage, done, total, note="": None
        elif sys.stderr.isatty():
            with _bars() as show:
                yield show
        else:
            yield _Lines()


class _Lines:
    """Progress as occasional lines, with the time left at the pace so far."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}
        self._shown: dict[str, float] = {}
        self._note = ""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        now = time.monotonic()
        if stage not in self._shown:
            self._began[stage], self._shown[stage] = (now, done), now
            self._say(stage, note if total is None else "")
        elif total is None and note != self._note:  # it has no count to tell
            self._say(stage, note)
        elif 0 < done != total and now - self._shown[stage] >= _QUIET_SECONDS:
            self._shown[stage] = now
            rest = "" if total is None else f" of {total:,}"
            parts = [f"{stage}: {done:,}{rest}", note, self._left(stage, done, total, now)]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def _say(self, stage: str, note: str) -> None:
        self._note = note
        print(": ".join(filter(None, (stage, note))), file=sys.stderr, flush=True)

    def _left(self, stage: str, done: int, total: int | None, now: float) -> str:
        start, before = self._began[stage]
        if total is None or done <= before:
            return ""
        return f"{clock((total - done) * (now - start) / (done - before))} left"


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or with hours.

    >>> clock(59.7), clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _bars() -> Iterator[Progress]:
    """Progress as bars, one per stage, that rich redraws from its own thread at a fixed rate.

    Calls in between only store two numbers.
    """
    from rich import progress
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    console = Console(stderr=True)

    class Bar(progress.BarColumn):
        """A bar that is left out beside a note on a narrow terminal."""

        def render(self, task: progress.Task) -> Any:
            narrow = task.fields["note"] and console.width < _ROOM
            return Text() if narrow else super().render(task)

    class Time(progress.ProgressColumn):
        """The time left if it is known, else the time passed."""

        def render(self, task: progress.Task) -> Text:
            left = None if task.finished else task.time_remaining
            shown = clock(task.elapsed or 0) if left is None else f"{clock(left)} left"
            return Text(shown, style="progress.remaining")

    columns = (
        progress.TextColumn("{task.description}"),
        Bar(24 if console.width >= _ROOM else 8),
        progress.MofNCompleteColumn(),
        Time(),
        progress.TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),
    )
    with progress.Progress(
        *columns, console=console, refresh_per_second=_REFRESHES, expand=True
    ) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def show(stage: str, done: int, total: int | None, note: str = "") -> None:
            if stage not in tasks:  # a run that goes on is not as fast as its first leap
                tasks[stage] = bars.add_task(stage, total=total, completed=done, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield show
