"""Batches of activations in a reproducible random order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sae_kernels.data.rows import TensorRows
from sae_kernels.data.windows import BufferedWindows, RowOrder, TensorWindows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sae_kernels.data.rows import RowSource
    from sae_kernels.data.windows import Window, WindowReader


class Batches(Protocol):
    """An iterator of batches [B, D], finite or endless, that can save and restore its position."""

    def __next__(self) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a position that :meth:`state_dict` returned."""
        ...


class ShuffledBatches:
    """Batches [B, D] in random order, each row once an epoch, in the source's dtype and device.

    Blocks of consecutive rows are permuted, then the rows inside each window of blocks, so that
    reading is sequential. While one window is handed out the next is read, about a batch of rows
    with every batch: memory holds two windows. A tensor's rows are gathered without a copy first.
    The order is a pure function of the arguments, the epoch and the position: an iterator made with
    `skip=other.position` and otherwise the same arguments goes on exactly where `other` stands.

    Args:
        source: a `RowSource`, such as a `ShardDataset`, or a tensor [N, D].
        batch_size: rows a batch.
        seed: another seed is another order.
        epochs: passes over the source; None never ends.
        drop_last: leave out the rows of an epoch that do not fill a batch.
        skip: batches to pass over without reading them.
        block_rows, window_blocks: a window is `block_rows * window_blocks` rows.
        reuse: write every batch to the memory of the one before it, which then no longer holds.
            Allocating afresh costs more than copying the rows.
        share: this process's number and how many there are: of every batch only its consecutive
            part of ``ceil(batch_size / processes)`` rows is handed out.

    Attributes:
        position: batches yielded or skipped so far.
        batches_per_epoch: batches in one pass.

    Raises:
        ValueError: an empty source, a count below its minimum, or fewer rows than one batch.

    >>> import torch
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
        reuse: bool = False,
        share: tuple[int, int] = (0, 1),
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
        self.drop_last, self.position = drop_last, skip
        n = self.source.n_tokens
        self.batches_per_epoch = n // batch_size if drop_last else -(-n // batch_size)
        if not self.batches_per_epoch:
            raise ValueError(
                f"expected at least one batch of {batch_size} rows, got {n} rows; "
                "use a smaller batch, drop_last=False or more data"
            )
        self._reuse, self._share = reuse, share
        self._kept: Tensor | None = None
        self._order = RowOrder(n, seed, block_rows, window_blocks)
        self._reader: WindowReader = (
            TensorWindows(self.source, self._order)
            if isinstance(self.source, TensorRows)
            else BufferedWindows(self.source, self._order)
        )

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        epoch, batch = divmod(self.position, self.batches_per_epoch)
        if self.epochs is not None and epoch >= self.epochs:
            raise StopIteration
        start = batch * self.batch_size
        stop = min(start + self.batch_size, self.source.n_tokens)
        rank, size = self._share
        width = -(-(stop - start) // size)
        start, stop = min(start + rank * width, stop), min(start + (rank + 1) * width, stop)
        window = self._order.at(epoch, start)
        following = self._following(window)
        if following is not None:
            self._reader.read_ahead(window, start - window.start, following)
        rows = self._output(stop - start)
        filled = 0
        while start < stop:
            window = self._order.at(epoch, start)
            end = min(stop, window.stop)
            part = rows[filled : filled + end - start]
            self._reader.gather(window, start - window.start, end - window.start, part)
            start, filled = end, filled + end - start
        self.position += 1
        return rows

    def _output(self, n: int) -> Tensor:
        if self._kept is not None and len(self._kept) == n:
            return self._kept
        rows = self._reader.empty(n)
        self._kept = rows if self._reuse else None
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The position, and all settings that the order depends on, as JSON values.

        >>> import torch
        >>> ShuffledBatches(torch.zeros(6, 1), 2, skip=4).state_dict()["position"]
        4
        """
        return {
            "position": self.position,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "n_tokens": self.source.n_tokens,
            "d_in": self.source.d_in,
            "block_rows": self._order.block_rows,
            "window_blocks": self._order.window_blocks,
            "drop_last": self.drop_last,
            # None for a tensor: only data on disk have checksums to compare.
            "data": getattr(self.source, "fingerprint", None),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where a saved iterator stood; reads nothing.

        Raises:
            ValueError: the state is of other data or settings, or is no state.
        """
        here = self.state_dict()
        differing = [
            f"{name} was {state.get(name)!r:.40} is {here.get(name)!r:.40}"
            for name in {**here, **state}
            if name != "position" and state.get(name, ...) != here.get(name, ...)
        ]
        if differing:
            raise ValueError(
                f"expected the batches that the state is of, got others: {', '.join(differing)}; "
                "use the same data and settings, or begin anew"
            )
        position = state.get("position")
        if type(position) is not int or position < 0:
            raise ValueError(
                f"position: expected a count of batches, got {position!r:.40}; begin anew"
            )
        self.position = position

    def _following(self, window: Window) -> Window | None:
        """The window that is needed after this one, if any."""
        if window.stop < self.batches_per_epoch * self.batch_size and window.stop < self._order.n:
            return self._order.windows(window.epoch)[window.number + 1]
        epoch = window.epoch + 1
        if self.epochs is not None and epoch >= self.epochs:
            return None
        return self._order.windows(epoch)[0]
