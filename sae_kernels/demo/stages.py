"""Progress and timing of the demo's stages."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class StageTimer:
    """Reports progress by stage and measures the seconds of each stage."""

    def __init__(self, progress: Callable[[str, int, int], object]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._start = self._since = time.perf_counter()
        self._name, self._done, self._total = "", 0, 0

    def stage(self, name: str, total: int) -> None:
        """Ends the previous stage and starts this one."""
        self._close()
        self._name, self._done, self._total = name, 0, total
        self._progress(name, 0, total)

    def advance(self, n: int) -> None:
        """Reports that this much more of the stage is done."""
        self._done += n
        self._progress(self._name, self._done, self._total)

    def finish(self) -> float:
        """Ends the last stage and returns the seconds of all together."""
        self._close()
        return self._since - self._start

    def _close(self) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = now - self._since
            self._progress(self._name, self._total, self._total)
        self._since = now
