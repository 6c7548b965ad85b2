"""Sources of activations that a trainer accepts: stored rows, a stream, or any iterable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sae_kernels.data.batches import Batches, ShuffledBatches
from sae_kernels.data.rows import RowSource, TensorRows
from sae_kernels.data.shards import ShardDataset

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from typing_extensions import TypeIs


class Stream(Batches, Protocol):
    """Batches without random access to rows, such as a model's activations while it reads text."""

    d_in: int
    batch_size: int

    def sample(self, n: int) -> torch.Tensor:
        """About n rows [n, D] that stand for the stream, without advancing it."""


Source = RowSource | torch.Tensor | Stream
Stored = RowSource | torch.Tensor | str | Path  # what can be read more than once; a folder by path


def is_rows(source: RowSource | Stream) -> TypeIs[RowSource]:
    """Whether a source gives any row by number, and not only the next batch."""
    return hasattr(source, "rows")


def open_source(source: Any) -> RowSource | Stream:
    """Converts what a user passes as activations to a row source or a stream.

    Args:
        source: a tensor [N, D], a folder of stored activations, a row source, a stream, or batches
            [B, D] that can be iterated over.

    Raises:
        TypeError: none of these.
        DataError: a folder without activations.

    Example:
        >>> open_source(torch.zeros(6, 2)).n_tokens
        6
        >>> open_source([torch.zeros(3, 2), torch.zeros(3, 2)]).batch_size
        3
    """
    if isinstance(source, torch.Tensor):
        return TensorRows(source)
    if isinstance(source, str | Path):
        return ShardDataset(source)
    if hasattr(source, "d_in") and (hasattr(source, "rows") or hasattr(source, "sample")):
        stored: RowSource | Stream = source
        return stored
    if hasattr(source, "__iter__"):
        return IterableStream(source)
    raise TypeError(
        "activations: expected a tensor [N, D], a folder of activations or batches [B, D] to "
        f"iterate over, got {type(source).__name__}"
    )


def open_rows(source: Stored) -> RowSource:
    """Opens activations that are read more than once: a tensor, a folder or a row source.

    Raises:
        TypeError: none of these; a stream or an iterable, which ends after one reading.
        DataError: a folder without activations.

    Example:
        >>> open_rows(torch.zeros(6, 2)).d_in
        2
    """
    opened = open_source(source)
    if not is_rows(opened):
        raise TypeError(
            "activations: expected a tensor [N, D] or a folder of activations, as they are read "
            f"more than once, got {type(source).__name__}"
        )
    return opened


def batches_of(
    source: RowSource | Stream,
    batch_size: int,
    seed: int,
    *,
    reuse: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Batches:
    """The batches of a source: rows shuffled by `seed`, a stream as it comes.

    ``batch_size``, ``seed``, ``reuse`` and ``share`` are those of ShuffledBatches; a stream ignores
    them.
    """
    if is_rows(source):
        return ShuffledBatches(source, batch_size, seed=seed, reuse=reuse, share=share)
    return source


class IterableStream:
    """A stream of the batches [B, D] of an iterable, which is restarted at its end if it can be.

    Args:
        batches: a list, a ``torch.utils.data.DataLoader``, a generator. A generator is read once,
            and a DataLoader may come in another order each time: the batches of :meth:`sample` are
            kept until they are handed out.

    Attributes:
        d_in: the width of the first batch.
        batch_size: its rows.
        position: batches handed out so far.

    Raises:
        ValueError: no batch; one of another width.
        TypeError: a batch that is no tensor [B, D].
    """

    def __init__(self, batches: Iterable[torch.Tensor]) -> None:
        self._batches = batches
        self._once = iter(batches) is batches
        self._ahead: list[torch.Tensor] = []
        self._source = iter(batches)
        self.position = 0
        first = next(self._source, None)
        if first is None:
            raise ValueError("activations: expected at least one batch [B, D], got none")
        self.d_in = 0
        first = self._checked(first)
        self.batch_size, self.d_in = first.shape
        self._ahead.append(first)

    def sample(self, n: int) -> torch.Tensor:
        """About n rows [n, D], or all if there are fewer, without advancing the stream.

        Of a list or another sequence, rows of all batches, or of n batches evenly spread over them.
        Of other iterables the first n rows: what comes later is not at hand before training, so
        their batches should not be sorted by source.
        """
        if isinstance(self._batches, Sequence):
            some = _evenly(range(len(self._batches)), n)
            shares = [n * (i + 1) // len(some) - n * i // len(some) for i in range(len(some))]
            batches = (self._checked(self._batches[i]) for i in some)
            rows = (x[_evenly(range(len(x)), m)] for x, m in zip(batches, shares, strict=True))
            return torch.cat(list(rows))
        while sum(map(len, self._ahead)) < n:
            following = next(self._source, None)
            if following is None:
                break
            self._ahead.append(self._checked(following))
        return torch.cat(self._ahead)[:n]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if self._ahead:
            batch = self._ahead.pop(0)
        else:
            found = next(self._source, None)
            if found is None and not self._once:
                self._source = iter(self._batches)
                found = next(self._source, None)
            if found is None:
                raise StopIteration
            batch = self._checked(found)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as a JSON value."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Skips the batches up to the saved position; they must come in the same order.

        Raises:
            ValueError: the iterable ends before that position.
        """
        while self.position < int(state["position"]):
            if next(self, None) is None:
                raise ValueError(
                    f"batches: expected those that the run began with, {state['position']} up to "
                    f"its checkpoint, got {self.position}; give the same batches"
                )

    def _checked(self, batch: Any) -> torch.Tensor:
        if isinstance(batch, list | tuple) and len(batch) == 1:  # a DataLoader of a TensorDataset
            batch = batch[0]
        if not isinstance(batch, torch.Tensor) or batch.dim() != 2 or not len(batch):
            shape = list(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
            raise TypeError(f"activations: expected batches that are tensors [B, D], got {shape}")
        if self.d_in and batch.shape[1] != self.d_in:
            raise ValueError(
                f"activations: expected batches of width {self.d_in}, as the first, got "
                f"{batch.shape[1]}"
            )
        return batch


def _evenly(items: range, n: int) -> list[int]:
    """n of these numbers, evenly spread, or all if there are fewer."""
    n = min(n, len(items))
    return [items[len(items) * i // n] for i in range(n)]
