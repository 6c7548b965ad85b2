"""In which order rows come, and the windows they are taken from."""

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
    """Blocks of rows that are shuffled together; they fill the places start to stop of an epoch."""

    epoch: int
    number: int  # in the epoch
    start: int
    stop: int
    blocks: list[tuple[int, int]]  # rows of the source


def permutation(n: int, *key: object) -> Tensor:
    """Of n, int64: a pure function of what stands in the key, such as seed, epoch and window."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(n, generator=generator)


class RowOrder:
    """Blocks of rows in random order, then the rows inside each window of blocks.

    A pure function of the arguments and the epoch.
    """

    def __init__(self, n: int, seed: int, block_rows: int, window_blocks: int) -> None:
        self.n, self.seed = n, seed
        self.block_rows, self.window_blocks = block_rows, window_blocks
        self._epochs: dict[int, list[Window]] = {}

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch, in their order."""
        if epoch not in self._epochs:
            near = {e: windows for e, windows in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs = near | {epoch: self._plan(epoch)}
        return self._epochs[epoch]

    def at(self, epoch: int, place: int) -> Window:
        """The window that fills a place of an epoch."""
        windows = self.windows(epoch)
        return windows[bisect_right(windows, place, key=lambda window: window.start) - 1]

    def within(self, window: Window) -> Tensor:
        """int64 [rows]: place after place, which row of the blocks laid end to end comes there."""
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


class Taker(Protocol):
    """Gives the rows of windows."""

    def take(self, window: Window, start: int, stop: int, out: Tensor) -> None:
        """Copies the rows at the places start to stop of a window, counted from its own start."""

    def room(self, n: int) -> Tensor:
        """Memory for so many rows."""

    def read_ahead(self, window: Window, start: int, following: Window) -> None:
        """Reads of the following window as large a share as lies before start in this one."""


class Resident:
    """Windows of a tensor in memory, which nothing need be copied from."""

    def __init__(self, source: TensorRows, order: RowOrder) -> None:
        self._source, self._order = source, order
        self._window: Window | None = None
        self._rows = torch.empty(0, dtype=torch.int64)

    def take(self, window: Window, start: int, stop: int, out: Tensor) -> None:
        if self._window != window:
            rows = torch.cat([torch.arange(*block) for block in window.blocks])
            self._rows = rows[self._order.within(window)].to(self._source.device)
            self._window = window
        self._source.take(self._rows[start:stop], out)

    def room(self, n: int) -> Tensor:
        source = self._source
        return torch.empty(n, source.d_in, dtype=source.dtype, device=source.device)

    def read_ahead(self, window: Window, start: int, following: Window) -> None:
        pass


class Copied:
    """Windows copied from a source block by block: one is taken from while the next is filled."""

    def __init__(self, source: RowSource, order: RowOrder) -> None:
        self._source, self._order = source, order
        self._current: _Filled | None = None
        self._next: _Filled | None = None
        self._row: Tensor | None = None  # of the device and dtype of all
        self._free: list[Tensor] = []  # buffers of a window each; there are two at most

    def take(self, window: Window, start: int, stop: int, out: Tensor) -> None:
        if not _is(self._current, window):
            ready, other = (self._next, None) if _is(self._next, window) else (None, self._next)
            self._release(self._current, other)
            self._current, self._next = ready, None
        if self._current is None:
            self._current = self._begun(window)
        self._current.read(len(window.blocks))
        torch.index_select(self._current.rows, 0, self._current.places[start:stop], out=out)

    def room(self, n: int) -> Tensor:
        if self._row is None:
            # A view of a row would keep its shard mapped.
            self._row = self._source.rows(0, 1).activations.new_empty(0)
        return self._row.new_empty(n, self._source.d_in)

    def read_ahead(self, window: Window, start: int, following: Window) -> None:
        if not _is(self._current, window):
            return  # one that is only about to be entered comes first
        if not _is(self._next, following):
            self._release(self._next)
            self._next = None
            self._next = self._begun(following)
        assert self._next is not None
        self._next.read(-(-start * len(following.blocks) // (window.stop - window.start)))

    def _begun(self, window: Window) -> _Filled:
        rows = self._free.pop() if self._free else self._buffer()
        return _Filled(window, self._source, rows, self._order.within(window).to(rows.device))

    def _release(self, *others: _Filled | None) -> None:
        self._free += [filled.rows for filled in others if filled is not None]

    def _buffer(self) -> Tensor:
        n = min(self._order.n, self._order.block_rows * self._order.window_blocks)
        return self.room(n)


def _is(filled: _Filled | None, window: Window) -> bool:
    return filled is not None and filled.window == window


class _Filled:
    """A window and its rows as they lie on disk, as far as they have been read."""

    def __init__(self, window: Window, source: RowSource, rows: Tensor, places: Tensor) -> None:
        self.window, self.rows, self.places = window, rows, places
        self._source = source
        self._blocks = self._end = 0

    def read(self, blocks: int) -> None:
        """Reads on until so many blocks are there."""
        for start, stop in self.window.blocks[self._blocks : blocks]:
            end = self._end + stop - start
            self.rows[self._end : end] = self._source.rows(start, stop).activations
            self._blocks, self._end = self._blocks + 1, end
