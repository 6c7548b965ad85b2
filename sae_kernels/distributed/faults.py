"""Finds the process whose failure stopped a run of several, and names it in one error."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sae_kernels.distributed.collectives import Collectives
from sae_kernels.errors import RankError, SaeKernelsError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Seconds for others to report. A rank with an error of its own has, before its connections close;
# those that only wait for it meet the closed connections at once.
PATIENCE = 1.5
_USER_ERRORS = (SaeKernelsError, ValueError, TypeError, OSError, ImportError)


def first_cause(error: Exception, store: Store, rank: int, size: int) -> RankError:
    """The error of the rank that made all of them stop, given this rank's.

    Every rank that can reports its own error to the store. One whose exchange with others failed
    waits for their reports: the cause is the first error of another kind, or the ranks that report
    nothing. Of these it ends those that the same torchrun started.

    Args:
        error: what this rank stopped with; its connections are closed by now, so that all others
            fail at their next exchange.
        store: that all ranks share, and that outlives each of them.
        rank, size: of this rank, and of all.

    Returns:
        The error for this rank to raise; ``said`` is false on one rank alone.
    """
    mine = named(error, rank)
    follows = _follows(error)
    store.set(f"fault/{rank}", json.dumps({"message": mine, "follows": follows}))
    message = _awaited(mine, store, size) if follows else mine
    return RankError(message, said=store.add("faults said", 1) > 1)


def introduce(store: Store, rank: int) -> None:
    """Says in the store where this rank's process is, so that others can end it if it hangs."""
    store.set(f"there/{rank}", json.dumps([*_siblings(), os.getpid()]))


def _siblings() -> list[Any]:
    """The machine, and the number of the process there that started this one: torchrun."""
    return [platform.node(), os.getppid()]


def _end(rank: int, store: Store) -> None:
    """Ends a rank that the same torchrun started, which would wait for it half a minute."""
    if not store.check([f"there/{rank}"]):
        return
    *siblings, process = json.loads(store.get(f"there/{rank}"))
    if siblings == _siblings():
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process, signal.SIGKILL)


def named(error: Exception, rank: int) -> str:
    """The message of a rank's error with the rank that caused it."""
    return str(error) if isinstance(error, RankError) else f"rank {rank}: {_described(error)}"


def _described(error: Exception) -> str:
    """The message of an error, with its type unless the user can mend it."""
    return str(error) if isinstance(error, _USER_ERRORS) else f"{type(error).__name__}: {error}"


def _follows(error: Exception) -> bool:
    """Whether an error comes from an exchange with other ranks, so that one of them caused it."""
    return isinstance(error, RankError) or any(
        frame.f_globals.get("__name__", "").startswith("torch.distributed")
        or frame.f_code is Collectives.swap.__code__  # it waits by methods that leave no frame
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _awaited(mine: str, store: Store, size: int) -> str:
    """The message of the first cause that is reported in time."""
    silent, end = set(range(size)), time.monotonic() + PATIENCE
    while silent and time.monotonic() < end:
        for rank in sorted(silent):
            if store.check([f"fault/{rank}"]):
                silent.remove(rank)
                report = json.loads(store.get(f"fault/{rank}"))
                if not report["follows"]:
                    return str(report["message"])
        time.sleep(0.02)
    if not silent:
        return mine
    for rank in silent:
        _end(rank, store)
    ranks = ", ".join(map(str, sorted(silent)))
    return (
        f"rank {ranks}: ended without a message (killed, perhaps out of memory) or hangs; seen by "
        f"{mine.partition('. ')[0]}; resume goes on from the last checkpoint"
    )
