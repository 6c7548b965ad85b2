"""Deferring Ctrl-C and SIGTERM until a checkpoint is saved."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from typing_extensions import Self


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler, _end)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block by SystemExit, as Ctrl-C does by KeyboardInterrupt."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # the caller's own handler stays
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) == _end:  # a process that ends may ignore it by now
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Interrupts:
    """Records the first SIGINT or SIGTERM instead of acting on it; a second one kills at once.

    A user's own handlers and ignored signals stay as they are. Outside the main thread, to which
    Python delivers all signals, it does nothing.

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
        for each in self._replaced:  # the system's default kills even where Python hangs
            signal.signal(each, signal.SIG_DFL)

    def raise_received(self, message: str) -> None:
        """Raises KeyboardInterrupt or SystemExit for the signal that this or another rank got."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + (self.received or signal.SIGTERM))  # or another rank's
