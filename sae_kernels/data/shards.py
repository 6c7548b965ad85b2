"""Reading activations on disk through memory maps. docs/data.md describes the files."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.config.row_filter import RowFilter
from sae_kernels.data.rows import Rows, combined_fingerprint
from sae_kernels.data.shard_file import ShardReader, changed_message, is_unchanged
from sae_kernels.data.shard_index import INDEX, Index
from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from sae_kernels.data.shard_index import Shard

_MAPPED = 4  # shards kept mapped: pages of a mapped file count as memory of the process


class ShardDataset:
    """A row source of a folder written by `ShardWriter`, read through memory maps.

    Opening checks the index, every file's size and every header, and reads no payload;
    `verify()` reads everything. The four shards that were read last stay mapped, so that memory
    does not grow with the size of the data set.

    Args:
        folder: with an index.json.
        check_on_read: compare a shard's SHA-256 when it is first read, which reads the whole file.

    Attributes:
        n_tokens: rows in all.
        d_in: D, the width of a row.
        dtype: of the activations.
        columns: "activations", and "tokens" and "documents" where they were written.
        metadata: what the writer was given.
        fingerprint: a hash of all shards' checksums, by which a resumed run recognises its data.

    Raises:
        DataError: a missing, damaged or contradictory file; the message names it.
    """

    def __init__(self, folder: str | Path, check_on_read: bool = False) -> None:
        self.folder = Path(folder)
        index = Index.read(self.folder)
        self.d_in, self.dtype = index.d_in, index.dtype
        self.columns, self.metadata = index.columns, index.metadata
        self._shards = index.shards
        self.fingerprint = combined_fingerprint([shard.sha256 for shard in index.shards])
        self._starts = list(accumulate((shard.count for shard in index.shards), initial=0))
        self.n_tokens = self._starts[-1]
        self._reader = ShardReader(self.folder, index, check_on_read)
        self._mapped = lru_cache(_MAPPED)(self._reader.map)
        for shard in index.shards:
            self._reader.check_header(shard)

    @property
    def facts(self) -> dict[str, Any]:
        """Which rows were left out, for the metadata of an SAE trained on these; {} if unknown.

        The settings of a :class:`~sae_kernels.config.row_filter.RowFilter`, and ``max_norm``, the
        largest norm in a list of one.

        Raises:
            DataError: settings out of range.
        """
        try:
            row_filter = RowFilter.recorded(self.metadata)
        except ValueError as error:
            raise DataError(f"{self.folder / INDEX}: {error}; harvest again") from error
        if row_filter is None:
            return {}
        max_norm = self.metadata.get("max_norm")
        bounds = None if row_filter.max_norm_multiple is None else [max_norm]
        return {**row_filter.to_json(), "max_norm": bounds}

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`: views of the mapped file inside one shard, else copies.

        Raises:
            ValueError: a range outside [0, n_tokens].
            DataError: a file that changed since the data set was opened.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(
                f"expected 0 <= start <= stop <= {self.n_tokens} rows, got {start} and {stop}"
            )
        if start == stop:
            empty = dict.fromkeys(self.columns, torch.empty(0, dtype=torch.int32))
            return Rows(**empty | {"activations": torch.empty(0, self.d_in, dtype=self.dtype)})
        pieces: list[Rows] = []
        while start < stop:
            shard, base = self._at(start)
            part = slice(start - base, min(stop - base, shard.count))
            mapped = self._mapped(shard)
            pieces.append(Rows(**{name: getattr(mapped, name)[part] for name in self.columns}))
            start = base + part.stop
        if len(pieces) == 1:
            return pieces[0]
        columns = ([getattr(piece, name) for piece in pieces] for name in self.columns)
        return Rows(**dict(zip(self.columns, map(torch.cat, columns), strict=True)))

    def verify(self) -> None:
        """Read every shard and compare its SHA-256.

        Raises:
            DataError: names the shards whose content is not what was written.
        """
        damaged = [shard for shard in self._shards if not is_unchanged(self.folder, shard)]
        if damaged:
            raise DataError(changed_message(self.folder, damaged))

    def where(self, row: int) -> str:
        """The file of a row and the row's number in it, for messages."""
        shard, base = self._at(row)
        return f"{self.folder / shard.file}, row {row - base}"

    def _at(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, and the shard's first row."""
        number = bisect_right(self._starts, row) - 1
        return self._shards[number], self._starts[number]
