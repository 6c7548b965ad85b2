"""Where the demo is and how long each of its stages took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """Tells progress apart by stage and takes the time of each."""

    def __init__(self, progress: Callable[[str, int, int], object]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._start = self._since = time.perf_counter()
        self._name, self._done, self._total = "", 0, 0

    def stage(self, name: str, total: int) -> None:
        """Ends the stage before and starts this one."""
        self._close()
        self._name, self._done, self._total = name, 0, total
        self._progress(name, 0, total)

    def advance(self, n: int) -> None:
        """So much more of the stage is done."""
        self._done += n
        self._progress(self._name, self._done, self._total)

    def finish(self) -> float:
        """Ends the last stage; the seconds of all."""
        self._close()
        return self._since - self._start

    def _close(self) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = now - self._since
            self._progress(self._name, self._total, self._total)
        self._since = now
