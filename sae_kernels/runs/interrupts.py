"""Ctrl-C and SIGTERM while something must be finished first."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from typing_extensions import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interrupts:
    """Notes the first SIGINT or SIGTERM and leaves the rest to whoever asks; a second one kills.

    Handlers of the user's own stay, and so does a signal that is ignored. Outside the main thread,
    where Python hands signals to nobody, it does nothing.

    Args:
        enabled: False does nothing.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self.received: signal.Signals | None = None
        self._replaced: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if self._enabled and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) in _DEFAULTS:
                    self._replaced[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._replaced:  # the system's own default: no Python code stands in its way
            signal.signal(each, signal.SIG_DFL)

    def raise_(self, message: str) -> None:
        """What the signal would have done, now that all is saved."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if self.received is not None:
            raise SystemExit(128 + self.received)
