"""Rows of activations in a reproducible random order."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


class Rows(NamedTuple):
    """Consecutive rows of a source; read-only, as they may be views of the source itself."""

    activations: Tensor  # [n, D]
    tokens: Tensor | None = None  # int32 [n]
    documents: Tensor | None = None  # int32 [n]


class RowSource(Protocol):
    """What a source of activations offers: its size and any run of consecutive rows."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def rows(self, start: int, stop: int) -> Rows: ...


class TensorRows:
    """A floating point tensor [N, D] in memory as a row source."""

    def __init__(self, activations: Tensor) -> None:
        if activations.ndim != 2 or not activations.is_floating_point():
            raise ValueError(
                "expected floating point activations [N, D], "
                f"got {activations.dtype} {list(activations.shape)}; flatten to one row a token"
            )
        self._activations = activations.detach()
        self.n_tokens, self.d_in = activations.shape
        self.dtype = activations.dtype

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, as a view."""
        return Rows(self._activations[start:stop])


class ShuffledBatches:
    """Batches [B, D] of a source, each row once an epoch, in the source's dtype and on its device.

    Blocks of consecutive rows are permuted, then the rows inside each window of blocks, so that
    reading is sequential and memory holds one window. The order is a pure function of the
    arguments, the epoch and the position: an iterator made with `skip=other.position` and
    otherwise the same arguments goes on exactly where `other` stands.

    Args:
        source: a `RowSource`, such as a `ShardDataset`, or a tensor [N, D].
        batch_size: rows a batch.
        seed: another seed is another order.
        epochs: passes over the source; None never ends.
        drop_last: leave out the rows of an epoch that do not fill a batch.
        skip: batches to pass over without reading them.
        block_rows, window_blocks: the memory is `block_rows * window_blocks` rows.

    Attributes:
        position: batches yielded or skipped so far.
        batches_per_epoch: batches in one pass.

    Raises:
        ValueError: an empty source, a count below its minimum, or fewer rows than one batch.

    >>> x = torch.arange(6.0)[:, None]
    >>> batches = ShuffledBatches(x, 2, epochs=1)
    >>> sorted(torch.cat(list(batches)).flatten().tolist())
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    def __init__(
        self,
        source: RowSource | Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
        skip: int = 0,
        block_rows: int = 4096,
        window_blocks: int = 16,
    ) -> None:
        for name, given, least in (
            ("batch_size", batch_size, 1),
            ("epochs", 1 if epochs is None else epochs, 1),
            ("skip", skip, 0),
            ("block_rows", block_rows, 1),
            ("window_blocks", window_blocks, 1),
        ):
            if given < least:
                raise ValueError(f"expected {name} of at least {least}, got {given}")
        self.source = TensorRows(source) if isinstance(source, Tensor) else source
        self.batch_size, self.seed, self.epochs = batch_size, seed, epochs
        self.position = skip
        n = self.source.n_tokens
        self.batches_per_epoch = n // batch_size if drop_last else -(-n // batch_size)
        if not self.batches_per_epoch:
            raise ValueError(
                f"expected at least one batch of {batch_size} rows, got {n} rows; "
                "use a smaller batch, drop_last=False or more data"
            )
        self._block_rows, self._window_blocks = block_rows, window_blocks
        self._plan: tuple[int, list[list[int]], list[int]] | None = None
        self._window: tuple[int, int, Tensor] | None = None
        self._buffer: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        epoch, batch = divmod(self.position, self.batches_per_epoch)
        if self.epochs is not None and epoch >= self.epochs:
            raise StopIteration
        start = batch * self.batch_size
        stop = min(start + self.batch_size, self.source.n_tokens)
        windows, bounds = self._epoch_plan(epoch)
        pieces = []
        while start < stop:
            index = bisect_right(bounds, start) - 1
            rows, order = self._load(epoch, index, windows[index])
            end = min(stop, bounds[index + 1])
            taken = order[start - bounds[index] : end - bounds[index]]
            pieces.append(rows.index_select(0, taken))
            start = end
        self.position += 1
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _epoch_plan(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """First rows of the blocks of each window, and where each window starts in the epoch."""
        if self._plan is None or self._plan[0] != epoch:
            n, size = self.source.n_tokens, self._block_rows
            order = self._permutation(-(-n // size), epoch, "blocks")
            blocks = (order * size).tolist()
            windows = [
                blocks[i : i + self._window_blocks]
                for i in range(0, len(blocks), self._window_blocks)
            ]
            counts = (sum(min(size, n - first) for first in window) for window in windows)
            self._plan = (epoch, windows, list(accumulate(counts, initial=0)))
        return self._plan[1], self._plan[2]

    def _load(self, epoch: int, index: int, blocks: list[int]) -> tuple[Tensor, Tensor]:
        """The rows of a window as they lie on disk, and the order to take them in."""
        source = self.source
        if self._buffer is None:
            n = min(source.n_tokens, self._block_rows * self._window_blocks)
            self._buffer = source.rows(0, 1).activations.new_empty(n, source.d_in)
        if self._window is None or self._window[:2] != (epoch, index):
            self._window, filled = None, 0
            for first in blocks:
                stop = min(first + self._block_rows, source.n_tokens)
                end = filled + stop - first
                self._buffer[filled:end] = source.rows(first, stop).activations
                filled = end
            order = self._permutation(filled, epoch, index).to(self._buffer.device)
            self._window = (epoch, index, order)
        return self._buffer, self._window[2]

    def _permutation(self, n: int, *key: object) -> Tensor:
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randperm(n, generator=generator)


def estimate_scale(source: RowSource | Tensor, n: int = 16384) -> float:
    """sqrt(D) over the mean norm of the first `n` rows: times this, rows have norm sqrt(D).

    Raises:
        ValueError: no rows, or rows without a positive finite norm.

    >>> estimate_scale(torch.full((8, 4), 0.5))
    2.0
    """
    source = TensorRows(source) if isinstance(source, Tensor) else source
    n = min(n, source.n_tokens)
    if n < 1:
        raise ValueError(f"expected at least one row to estimate the scale from, got {n}")
    total = 0.0
    for start in range(0, n, 4096):
        rows = source.rows(start, min(start + 4096, n)).activations
        total += rows.float().norm(dim=1).sum(dtype=torch.float64).item()
    if not 0 < total < math.inf:
        raise ValueError(f"expected activations with a positive finite norm, got {total / n}")
    return math.sqrt(source.d_in) * n / total
