"""Batches made ahead by a thread, on a GPU beside the consumer's work."""

from __future__ import annotations

import threading
import weakref
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

    from sae_kernels.data.batches import Batches

_CPU = torch.device("cpu")
_PATIENCE = 5.0  # seconds that the end of the program waits for a batch in the making


class Prefetched:
    """Hands out the batches of another iterator that a thread has made ahead, on a device.

    Leave its `with` block, or call `close()`, to end the thread. The iterator inside belongs to
    the thread and is ahead: ask this one for its state.

    Args:
        batches: whose batches; a `ShuffledBatches`, say.
        device: where they are handed out. On a GPU the copies run on a stream of their own, from
            pinned memory.
        depth: batches that may lie ready; so many more are in memory.

    Raises:
        ValueError: a depth below 1; a batch asked for after `close()`.

    Example:
        >>> from sae_kernels.data import ShuffledBatches
        >>> x = torch.arange(6.0)[:, None]
        >>> with Prefetched(ShuffledBatches(x, 2, epochs=1)) as batches:
        ...     sorted(torch.cat(list(batches)).flatten().tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    def __init__(self, batches: Batches, device: torch.device = _CPU, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth: expected at least 1 batch, got {depth}")
        self._batches = batches
        self._state = batches.state_dict()
        make = _OnGPU(batches, device) if device.type == "cuda" else _Plain(batches, device)
        self._worker = _Worker(make, batches.state_dict, depth)
        # Also when this object is dropped unclosed, and before the interpreter takes itself apart.
        self._forgotten = weakref.finalize(self, self._worker.stop, _PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        item = self._worker.take()
        self._state = item.state
        if item.ready is not None:
            stream = torch.cuda.current_stream(item.batch.device)
            stream.wait_event(item.ready)
            # Or the memory could go to a later copy while this stream still reads it.
            item.batch.record_stream(stream)
        return item.batch

    def state_dict(self) -> dict[str, Any]:
        """The state of the batches after the last one handed out."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; before the first batch.

        Raises:
            ValueError: batches have been made, or the state does not fit.
        """
        if self._worker.started:
            raise ValueError(
                "expected load_state_dict before the first batch, got it after; make a new "
                "Prefetched"
            )
        self._batches.load_state_dict(state)
        self._state = self._batches.state_dict()

    def close(self) -> None:
        """Ends the thread, at the latest after the batch that it is making."""
        self._forgotten.detach()
        self._worker.stop()


class _Item(NamedTuple):
    """A batch, the state after it, and what its copy signals."""

    batch: Tensor
    state: dict[str, Any]
    ready: torch.cuda.Event | None


class _Worker:
    """The thread and its queue; does not know the `Prefetched`, which may thus be forgotten."""

    def __init__(
        self,
        make: Callable[[], tuple[Tensor, torch.cuda.Event | None]],
        state: Callable[[], dict[str, Any]],
        depth: int,
    ) -> None:
        self._make, self._state = make, state
        self._room = threading.Semaphore(depth)
        self._items: SimpleQueue[_Item | BaseException] = SimpleQueue()
        self._ended: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="Prefetched", daemon=True)
        self.started = False

    def take(self) -> _Item:
        """The next batch; starts the thread for the first one."""
        if self._ended is None and not self._stopped.is_set():
            if not self.started:
                self.started = True
                self._thread.start()
            item = self._items.get()
            if isinstance(item, _Item):
                self._room.release()
                return item
            self._ended = item
        if self._stopped.is_set():
            raise ValueError("expected an open Prefetched, got a closed one; make a new one")
        assert self._ended is not None
        raise self._ended

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread whatever it waits for, and whoever waits for it."""
        self._stopped.set()
        self._room.release()
        if self.started and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        self._items.put(StopIteration())

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._stopped.is_set():
                return
            try:
                batch, ready = self._make()
                self._items.put(_Item(batch, self._state(), ready))
            except BaseException as error:  # the caller's, whatever it is
                self._items.put(error)
                return


class _Plain:
    """Hands batches over as they are."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __call__(self) -> tuple[Tensor, None]:
        return next(self._batches).to(self._device), None


class _OnGPU:
    """Copies batches to a GPU on a stream of its own, by way of two pinned buffers."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._batches, self._device = batches, torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        # A source that lies on the GPU may still be being written.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._pinned: list[tuple[Tensor, torch.cuda.Event]] = []

    def __call__(self) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            batch = next(self._batches)
            if batch.device == self._device:
                return batch, self._stream.record_event()
            pinned = self._buffer(batch)
            pinned[: len(batch)] = batch
            copy = pinned[: len(batch)].to(self._device, non_blocking=True)
            ready = self._stream.record_event()
            self._pinned.append((pinned, ready))
            return copy, ready

    def _buffer(self, batch: Tensor) -> Tensor:
        """A pinned buffer that no copy reads any more and that is long enough."""
        if len(self._pinned) == 2:
            pinned, ready = self._pinned.pop(0)
            ready.synchronize()
            if len(pinned) >= len(batch):
                return pinned
        return torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
