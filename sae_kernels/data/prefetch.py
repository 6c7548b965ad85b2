"""Prefetching: a thread makes batches ahead and copies them to the device."""

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
_EXIT_TIMEOUT = 5.0  # seconds that the end of the program waits for the batch being made


class Prefetched:
    """The batches of another iterator, made ahead by a thread and moved to a device.

    Leave its `with` block, or call `close()`, to end the thread. The wrapped iterator belongs to
    the thread and is ahead: save the state of this one instead.

    Args:
        batches: the iterator to wrap, such as a `ShuffledBatches`.
        device: where the batches go. To a GPU the copies run on a stream of their own, from
            pinned memory.
        depth: batches made ahead, which memory holds besides the one in use.

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
        make = (
            _OnGPU(batches, device)
            if device.type == "cuda"
            else lambda: (next(batches).to(device), None)
        )
        self._worker = _Worker(make, batches.state_dict, depth)
        # Ends the thread also when this object is dropped unclosed, and before interpreter exit.
        self._finalizer = weakref.finalize(self, self._worker.stop, _EXIT_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        item = self._worker.get()
        self._state = item.state
        if item.ready is not None:
            stream = torch.cuda.current_stream(item.batch.device)
            stream.wait_event(item.ready)
            # Otherwise the allocator could reuse the memory while this stream still reads it.
            item.batch.record_stream(stream)
        return item.batch

    def state_dict(self) -> dict[str, Any]:
        """The state of the batches after the last one handed out."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of the wrapped iterator; call it before the first batch.

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
        """Ends the thread, at the latest when the batch under way is made."""
        self._finalizer.detach()
        self._worker.stop()


class _Item(NamedTuple):
    """A batch, the iterator's state after it, and the event that its copy to a GPU records."""

    batch: Tensor
    state: dict[str, Any]
    ready: torch.cuda.Event | None


class _Worker:
    """The thread and its queue; does not refer to the `Prefetched`, which can thus be collected."""

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

    def get(self) -> _Item:
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
        """Ends the thread and wakes up a caller that waits in `get`."""
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
            except BaseException as error:  # raised again in the consumer's thread
                self._items.put(error)
                return


class _OnGPU:
    """Makes the next batch and copies it to a GPU on its own stream through two pinned buffers."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._batches, self._device = batches, torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        # A source on the GPU may still be being written by the current stream.
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
        """A pinned buffer as long as the batch that no copy reads any more."""
        if len(self._pinned) == 2:
            pinned, ready = self._pinned.pop(0)
            ready.synchronize()
            if len(pinned) >= len(batch):
                return pinned
        return torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
