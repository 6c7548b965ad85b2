"""A lock that keeps a second process from writing to a folder."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder for this process; the system unlocks it when the process dies.

    Raises:
        DataError: another process, or another writer in this one, holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{folder}: expected a folder that nobody uses, another process is writing to it; "
                "wait for its end, or choose another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)
