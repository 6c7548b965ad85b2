"""Checkpoints written by a thread while the training goes on."""

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
    """Takes copies of a training's state and writes each in the background.

    The copies go into buffers that the next one reuses: the extra memory is that of one
    checkpoint's tensors, from the first save on.

    Args:
        parent: the folder of the checkpoints.
        keep: how many stay; 0: all.

    Attributes:
        last: the step of the newest checkpoint that is whole on the disk, or None.

    Raises:
        OSError: at the next call after a write that failed. Older checkpoints are intact.
    """

    def __init__(self, parent: Path, keep: int, last: int | None = None) -> None:
        self.parent, self.keep, self.last = parent, keep, last
        self._staged: dict[str, Staging] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def nbytes(self) -> int:
        """The memory of the copies."""
        return sum(staging.nbytes for staging in self._staged.values())

    def save(self, step: int, contents: checkpoint.Contents) -> None:
        """Copies the state and begins to write it, once the write before is done."""
        self.wait()
        for name, tensors in contents.tensors.items():
            self._staged.setdefault(name, Staging()).take(tensors)
        self._thread = threading.Thread(
            target=self._write, args=(step, contents.values), name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raises what a write that has ended failed with."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the write under way, and raises what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        try:
            _yield_to_others()
            checkpoint.write(self.parent, step, self._staged, values)
            self.last = step
            checkpoint.retain(self.parent, step, self.keep)
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the error under way is the one to report
            self._thread.join()


def _yield_to_others() -> None:
    """The checksum is to cost idle time and not the steps'; on Linux a thread has a priority."""
    if hasattr(os, "setpriority") and hasattr(threading, "get_native_id"):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
