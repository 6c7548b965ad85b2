"""Saving checkpoints in a background thread."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

from sae_kernels.runs import checkpoint
from sae_kernels.runs.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from typing_extensions import Self


class Saver:
    """Copies a training's state and writes the copy to disk in the background.

    The buffers are reused: from the first save on they take the memory of one checkpoint.

    Args:
        parent: the folder of the checkpoints.
        keep: how many checkpoints to keep; 0 keeps all.
        last: the step of the newest checkpoint in the folder, if any.

    Attributes:
        last: the step of the newest checkpoint on the disk, or None.

    Raises:
        OSError: at the next call after a failed write. Older checkpoints are intact.
    """

    def __init__(self, parent: Path, keep: int, last: int | None = None) -> None:
        self.parent, self.keep, self.last = parent, keep, last
        self._staged: dict[str, Staging] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the copies take."""
        return sum(staging.nbytes for staging in self._staged.values())

    def save(self, step: int, contents: checkpoint.Contents) -> None:
        """Waits for the previous write, copies the state and starts to write it."""
        self.wait()
        for name, tensors in contents.tensors.items():
            self._staged.setdefault(name, Staging()).fill(tensors)
        self._thread = threading.Thread(
            target=self._write, args=(step, contents.values), name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raises the error of a finished write that failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the write under way and raises its error if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        try:
            _lower_priority()
            self._publish(step, values)
            self.last = step
        except BaseException as error:
            self._error = error

    def _publish(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        checkpoint.write(self.parent, step, self._staged, values)
        checkpoint.retain(self.parent, step, self.keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # a failed write must not hide the error under way
            self._thread.join()


def _lower_priority() -> None:
    """Lowers this thread's priority (Linux), so that checksums do not slow the training steps."""
    if hasattr(os, "setpriority") and hasattr(threading, "get_native_id"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
