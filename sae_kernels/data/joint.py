"""Several sources of activations read together: a crosscoder's layers, a transcoder's two ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.data.rows import Rows, TensorRows, combined_fingerprint
from sae_kernels.data.shards import ShardDataset
from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.data.rows import RowSource


class JointRows:
    """A row source that concatenates the rows of several sources of the same tokens.

    Args:
        sources: at least one; tensors [N, D] or data sets.

    Attributes:
        n_tokens, d_in, dtype: as of any source; d_in is the sum of their widths.
        fingerprint: combined from those of the data sets among them; None if there are none.

    Raises:
        ValueError: no sources, or sources of different lengths.
        DataError: while reading, if they hold different tokens.

    Example:
        >>> joint = JointRows([torch.zeros(4, 2), torch.ones(4, 3)])
        >>> joint.d_in, joint.rows(0, 1).activations.tolist()
        (5, [[0.0, 0.0, 1.0, 1.0, 1.0]])
    """

    def __init__(self, sources: Sequence[RowSource | torch.Tensor]) -> None:
        if not sources:
            raise ValueError("sources: expected at least one, got none")
        self.sources: list[RowSource] = [
            TensorRows(source) if isinstance(source, torch.Tensor) else source for source in sources
        ]
        lengths = [source.n_tokens for source in self.sources]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"sources: expected the same tokens in each, got {lengths} rows; harvest all of "
                "them from the same text"
            )
        self.n_tokens = lengths[0]
        self.d_in = sum(source.d_in for source in self.sources)
        prints = [getattr(source, "fingerprint", None) for source in self.sources]
        self.fingerprint = (
            combined_fingerprint([each or "" for each in prints]) if any(prints) else None
        )
        self.dtype = self.sources[0].dtype
        for source in self.sources:
            self.dtype = torch.promote_types(self.dtype, source.dtype)

    @property
    def facts(self) -> dict[str, Any]:
        """The filter of the rows, if all sources have the same; ``max_norm`` has each bound."""
        parts = [dict(getattr(source, "facts", {})) for source in self.sources]
        bounds = [part.pop("max_norm", None) for part in parts]
        if not parts[0] or any(part != parts[0] for part in parts):
            return {}
        every = None if None in bounds else [bound for part in bounds for bound in part]
        return {**parts[0], "max_norm": every}

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of all sources."""
        parts = [source.rows(start, stop) for source in self.sources]
        self._check_tokens(start, parts)
        activations = torch.cat([part.activations.to(self.dtype) for part in parts], dim=1)
        return Rows(activations, parts[0].tokens, parts[0].documents)

    def _check_tokens(self, start: int, parts: list[Rows]) -> None:
        """Raises DataError where two sources that store tokens hold different ones."""
        told = [i for i, part in enumerate(parts) if part.tokens is not None]
        for i in told[1:]:
            one, other = parts[told[0]].tokens, parts[i].tokens
            assert one is not None
            assert other is not None
            if not torch.equal(one, other):
                row = int((one != other).nonzero()[0])
                places = [_where(self.sources[j], start + row) for j in (told[0], i)]
                raise DataError(
                    f"row {start + row}: expected the same token in all sources, got "
                    f"{int(one[row])} ({places[0]}) and {int(other[row])} ({places[1]}); harvest "
                    "all of them from the same text"
                )


def side_by_side(sources: Sequence[RowSource]) -> RowSource:
    """The rows of one source, or of several concatenated.

    Example:
        >>> from sae_kernels.data import TensorRows
        >>> rows = TensorRows(torch.zeros(4, 2))
        >>> side_by_side([rows]) is rows, side_by_side([rows, rows]).d_in
        (True, 4)
    """
    return sources[0] if len(sources) == 1 else JointRows(sources)


def _where(source: RowSource, row: int) -> str:
    return source.where(row) if isinstance(source, ShardDataset) else f"row {row}"
