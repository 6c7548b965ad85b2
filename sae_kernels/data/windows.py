"""The shuffled order of rows, and reading them window by window."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae_kernels.data.rows import RowSource, TensorRows


class Window(NamedTuple):
    """Blocks of rows that are shuffled together to be rows start to stop of an epoch's order."""

    epoch: int
    number: int  # in the epoch
    start: int
    stop: int
    blocks: list[tuple[int, int]]  # rows of the source


def permutation(n: int, *key: object) -> Tensor:
    """A random permutation of n, int64 [n]: a pure function of n and the key (seed, epoch, ...)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(n, generator=generator)


class RowOrder:
    """The random order of rows: blocks are permuted, then the rows inside each window of blocks.

    A pure function of the arguments and the epoch.
    """

    def __init__(self, n: int, seed: int, block_rows: int, window_blocks: int) -> None:
        self.n, self.seed = n, seed
        self.block_rows, self.window_blocks = block_rows, window_blocks
        self._epochs: dict[int, list[Window]] = {}

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch, in order."""
        if epoch not in self._epochs:
            near = {e: windows for e, windows in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs = near | {epoch: self._plan(epoch)}
        return self._epochs[epoch]

    def at(self, epoch: int, place: int) -> Window:
        """The window that holds row number `place` of an epoch's order."""
        windows = self.windows(epoch)
        return windows[bisect_right(windows, place, key=lambda window: window.start) - 1]

    def within(self, window: Window) -> Tensor:
        """The permutation of a window's rows, int64: numbers in its concatenated blocks."""
        return permutation(window.stop - window.start, self.seed, window.epoch, window.number)

    def _plan(self, epoch: int) -> list[Window]:
        order = permutation(-(-self.n // self.block_rows), self.seed, epoch, "blocks")
        firsts = (order * self.block_rows).tolist()
        blocks = [(first, min(first + self.block_rows, self.n)) for first in firsts]
        some = [
            blocks[i : i + self.window_blocks] for i in range(0, len(blocks), self.window_blocks)
        ]
        counts = (sum(stop - start for start, stop in each) for each in some)
        bounds = pairwise(accumulate(counts, initial=0))
        return [
            Window(epoch, number, start, stop, each)
            for number, ((start, stop), each) in enumerate(zip(bounds, some, strict=True))
        ]


class WindowReader(Protocol):
    """Copies shuffled rows out of windows."""

    def gather(self, window: Window, start: int, stop: int, out: Tensor) -> None:
        """Copies rows start to stop of a window's shuffled order to out."""

    def empty(self, n: int) -> Tensor:
        """An uninitialised tensor for n rows, in the source's dtype and on its device."""

    def read_ahead(self, window: Window, start: int, following: Window) -> None:
        """Reads as large a share of the following window as lies before start in this one."""


class TensorWindows:
    """Gathers rows straight from a tensor in memory; nothing is read ahead."""

    def __init__(self, source: TensorRows, order: RowOrder) -> None:
        self._source, self._order = source, order
        self._window: Window | None = None
        self._rows = torch.empty(0, dtype=torch.int64)

    def gather(self, window: Window, start: int, stop: int, out: Tensor) -> None:
        if self._window != window:
            rows = torch.cat([torch.arange(*block) for block in window.blocks])
            self._rows = rows[self._order.within(window)].to(self._source.device)
            self._window = window
        self._source.gather(self._rows[start:stop], out)

    def empty(self, n: int) -> Tensor:
        source = self._source
        return torch.empty(n, source.d_in, dtype=source.dtype, device=source.device)

    def read_ahead(self, window: Window, start: int, following: Window) -> None:
        pass


class BufferedWindows:
    """Gathers rows from a window read into memory, while the next one is read block by block."""

    def __init__(self, source: RowSource, order: RowOrder) -> None:
        self._source, self._order = source, order
        self._current: _WindowBuffer | None = None
        self._next: _WindowBuffer | None = None
        self._row: Tensor | None = None  # empty, with the device and dtype of the rows
        self._free: list[Tensor] = []  # window buffers to reuse; there are two in all

    def gather(self, window: Window, start: int, stop: int, out: Tensor) -> None:
        if not _holds(self._current, window):
            ready, other = (self._next, None) if _holds(self._next, window) else (None, self._next)
            self._release(self._current, other)
            self._current, self._next = ready, None
        if self._current is None:
            self._current = self._start_reading(window)
        self._current.read(len(window.blocks))
        torch.index_select(self._current.rows, 0, self._current.places[start:stop], out=out)

    def empty(self, n: int) -> Tensor:
        if self._row is None:
            # A view of a row would keep its shard mapped.
            self._row = self._source.rows(0, 1).activations.new_empty(0)
        return self._row.new_empty(n, self._source.d_in)

    def read_ahead(self, window: Window, start: int, following: Window) -> None:
        if not _holds(self._current, window):
            return  # this window itself is not read yet
        if not _holds(self._next, following):
            self._release(self._next)
            self._next = None
            self._next = self._start_reading(following)
        assert self._next is not None
        self._next.read(-(-start * len(following.blocks) // (window.stop - window.start)))

    def _start_reading(self, window: Window) -> _WindowBuffer:
        n = min(self._order.n, self._order.block_rows * self._order.window_blocks)
        rows = self._free.pop() if self._free else self.empty(n)
        return _WindowBuffer(window, self._source, rows, self._order.within(window).to(rows.device))

    def _release(self, *others: _WindowBuffer | None) -> None:
        self._free += [filled.rows for filled in others if filled is not None]


def _holds(filled: _WindowBuffer | None, window: Window) -> bool:
    return filled is not None and filled.window == window


class _WindowBuffer:
    """A window and the rows of its blocks that have been read, in the order of the source."""

    def __init__(self, window: Window, source: RowSource, rows: Tensor, places: Tensor) -> None:
        self.window, self.rows, self.places = window, rows, places
        self._source = source
        self._blocks = self._end = 0

    def read(self, blocks: int) -> None:
        """Reads until this many blocks of the window are in memory."""
        for start, stop in self.window.blocks[self._blocks : blocks]:
            end = self._end + stop - start
            self.rows[self._end : end] = self._source.rows(start, stop).activations
            self._blocks, self._end = self._blocks + 1, end
