"""Several sources of activations read together: a crosscoder's layers, a transcoder's two ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.data.batches import Rows, TensorRows
from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.data.batches import RowSource


class JointRows:
    """Sources of the same tokens side by side: row i is all their rows i, one after the other.

    Args:
        sources: at least one; tensors [N, D] or data sets.

    Attributes:
        n_tokens, d_in, dtype: as of any source; d_in is the sum of their widths.

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
        self.dtype = self.sources[0].dtype
        for source in self.sources:
            self.dtype = torch.promote_types(self.dtype, source.dtype)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` of all sources."""
        parts = [source.rows(start, stop) for source in self.sources]
        tokens = [part.tokens for part in parts if part.tokens is not None]
        for other in tokens[1:]:
            if not torch.equal(other, tokens[0]):
                raise DataError(
                    f"rows {start} to {stop}: expected the same tokens in all sources, they "
                    "differ; harvest all of them from the same text"
                )
        activations = torch.cat([part.activations.to(self.dtype) for part in parts], dim=1)
        return Rows(activations, parts[0].tokens, parts[0].documents)
