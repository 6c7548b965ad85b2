"""Writing activations to disk as shards, each atomically, and the index last.

A folder without index.json is not a data set: an interrupted writer leaves finished shards and
no index, and another can go on after them. docs/data.md describes the files.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_kernels.data.shard_file import changed_message, is_unchanged
from sae_kernels.data.shard_index import DTYPES, INDEX, Index, Shard
from sae_kernels.errors import DataError, NonFiniteError
from sae_kernels.io.files import digest, publish, remove_stale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Self

_INT32 = torch.iinfo(torch.int32)


class ShardWriter:
    """Writes activations to a folder, one shard of rows in memory at a time.

    Use it as a context manager: leaving it normally writes the index, leaving it by an exception
    keeps the finished shards and writes none.

    Args:
        folder: made when missing.
        d_in: D, the width of a row.
        dtype: float32, bfloat16 or float16; what is written is converted.
        rows_per_shard: rows of every shard but the last.
        metadata: anything JSON can hold: the model, the layer, ...
        overwrite: replace a data set in the folder; its index is removed first.
        finished: shards of an interrupted writer, after which this one goes on.

    Attributes:
        shards: the finished shards so far.
        pending: rows written that no finished shard holds.
        metadata: as given; may be added to until the index is written.

    Raises:
        DataError: the folder holds a data set already; on entering the `with` block, a finished
            shard that is missing or has changed.
        TypeError, ValueError: an argument or metadata that cannot be written.

    >>> import tempfile
    >>> from sae_kernels.data.shards import ShardDataset
    >>> folder = tempfile.TemporaryDirectory()
    >>> with ShardWriter(folder.name, 2) as writer:
    ...     writer.write(torch.ones(3, 2), tokens=torch.tensor([7, 8, 9]))
    >>> ShardDataset(folder.name).rows(1, 3).tokens
    tensor([8, 9], dtype=torch.int32)
    >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | Path,
        d_in: int,
        *,
        dtype: torch.dtype = torch.float32,
        rows_per_shard: int = 65536,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        finished: Sequence[Shard] = (),
    ) -> None:
        if dtype not in DTYPES.values():
            raise TypeError(f"expected dtype float32, bfloat16 or float16, got {dtype}")
        if d_in < 1 or rows_per_shard < 1:
            raise ValueError(
                f"expected d_in and rows_per_shard of at least 1, got {d_in} and {rows_per_shard}"
            )
        self.folder, self.d_in, self.dtype = Path(folder), d_in, dtype
        self.rows_per_shard = rows_per_shard
        # Serialised now, so that unserialisable metadata fail before hours of work.
        self.metadata = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
        if not overwrite and (self.folder / INDEX).exists():
            raise DataError(
                f"{self.folder} holds a data set already; choose another folder or overwrite=True"
            )
        self._buffer: dict[str, Tensor] = {}
        self.shards: list[Shard] = list(finished)
        self.pending = 0
        self._open = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if changed := [each for each in self.shards if not is_unchanged(self.folder, each)]:
            raise DataError(changed_message(self.folder, changed))
        (self.folder / INDEX).unlink(missing_ok=True)
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._open = False
        if kind is None:
            self._finish()
        self._buffer = {}

    def write(
        self, activations: Tensor, tokens: Tensor | None = None, documents: Tensor | None = None
    ) -> None:
        """Append rows.

        Args:
            activations: [n, D], any floating dtype, any device.
            tokens, documents: integers [n] that fit int32; given always or never.

        Raises:
            NonFiniteError: NaN or infinity, also when only the stored dtype is too narrow.
            TypeError, ValueError: shapes, dtypes or columns that do not fit the data set.
        """
        if not self._open:
            raise ValueError("expected an open ShardWriter; write inside its `with` block")
        columns = {"activations": activations.detach()}
        self._check_activations(columns["activations"])
        for name, ids in (("tokens", tokens), ("documents", documents)):
            if ids is not None:
                _check_ids(name, ids, len(activations))
                columns[name] = ids
        if not self._buffer:
            self._buffer = {name: self._empty(name) for name in columns}
        if columns.keys() != self._buffer.keys():
            raise ValueError(
                f"expected the columns of the first write, {', '.join(self._buffer)}, "
                f"got {', '.join(columns)}; give tokens and documents always or never"
            )
        n, start = len(activations), 0
        while start < n:
            stop = min(n, start + self.rows_per_shard - self.pending)
            end = self.pending + stop - start
            for name, column in columns.items():
                self._buffer[name][self.pending : end] = column[start:stop]
            start, self.pending = stop, end
            if end == self.rows_per_shard:
                self._flush()

    def _check_activations(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"expected activations [n, {self.d_in}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating point activations, got {x.dtype}")
        # The extremes show NaN, infinity and overflow at a fraction of isfinite's cost.
        extremes = x.aminmax() if len(x) else ()
        if not all(math.isfinite(e.to(self.dtype)) for e in extremes):
            given = all(math.isfinite(e) for e in extremes)
            remedy = overflow_remedy(self.dtype) if given else "look for NaN in the model"
            raise NonFiniteError(
                f"expected activations that are finite in {self.dtype}, got extremes "
                f"{[float(e) for e in extremes]}; {remedy}"
            )

    def _empty(self, name: str) -> Tensor:
        if name == "activations":
            return torch.empty(self.rows_per_shard, self.d_in, dtype=self.dtype)
        return torch.empty(self.rows_per_shard, dtype=torch.int32)

    def _flush(self) -> None:
        path = self.folder / f"shard_{len(self.shards):05d}.safetensors"
        tensors = {name: column[: self.pending] for name, column in self._buffer.items()}
        publish(path, lambda temporary: save_file(tensors, temporary))
        size = path.stat().st_size
        self.shards.append(Shard(path.name, self.pending, size, digest(path)))
        self.pending = 0

    def _finish(self) -> None:
        if self.pending:
            self._flush()
        remove_stale(self.folder)
        for path in self.folder.glob("shard_*.safetensors"):
            # Of an earlier writer that was interrupted or wrote more shards.
            number = re.fullmatch(r"shard_(\d{5,})\.safetensors", path.name)
            if number and int(number[1]) >= len(self.shards):
                path.unlink()
        columns = tuple(self._buffer) or ("activations",)
        Index(self.d_in, self.dtype, columns, self.metadata, tuple(self.shards)).write(self.folder)


def overflow_remedy(dtype: torch.dtype) -> str:
    """What to do about finite activations that are infinite in the stored dtype."""
    wider = "bfloat16" if dtype == torch.float16 else "float32"
    most = torch.finfo(dtype).max
    return f"{dtype} ends at {most:.6g}, store dtype=torch.{wider} (--dtype {wider})"


def _check_ids(name: str, ids: Tensor, n: int) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"expected integer {name}, got {ids.dtype}")
    if list(ids.shape) != [n]:
        raise ValueError(f"expected {name} [{n}], one a row, got {list(ids.shape)}")
    if n and not _INT32.min <= int(ids.min()) <= int(ids.max()) <= _INT32.max:
        raise ValueError(f"expected {name} that fit int32, got {int(ids.max())}")
