"""Cosines between all pairs of rows of a matrix, in tiles instead of an [F, F] matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# A tile of cosines takes 4 MiB and a block of rows in fp64 at most 32; a tile may be all pairs, and
# each of these takes 16 bytes.
_EDGE = 1024
_BLOCK = 1 << 22


class CosineTile(NamedTuple):
    """A tile of the upper triangle of the [F, F] matrix of cosines.

    Attributes:
        first: the number of the tile's first row.
        second: the number of the row that its first column stands for.
        cosines: fp32 [m, n] in [-1, 1]; -inf where a pair was seen before, is a row with itself, or
            has a row of zeros, which has no direction.
    """

    first: int
    second: int
    cosines: torch.Tensor

    def pairs(self, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The row numbers (i, j) of all pairs whose cosine is at or above the threshold."""
        i, j = (self.cosines >= threshold).nonzero(as_tuple=True)
        return i + self.first, j + self.second


def tile_edge(width: int) -> int:
    """Number of rows in a tile, for rows of this width."""
    return max(1, min(_EDGE, _BLOCK // max(1, width)))


def n_tiles(rows: torch.Tensor) -> int:
    """Number of tiles that :func:`cosine_tiles` gives."""
    blocks = math.ceil(rows.shape[0] / tile_edge(rows.shape[1]))
    return blocks * (blocks + 1) // 2


def cosine_tiles(rows: torch.Tensor, edge: int | None = None) -> Iterator[CosineTile]:
    """Yields the fp32 cosine of every pair of rows once, in tiles.

    Args:
        rows: [F, D], of any floating point dtype.
        edge: rows of a tile; default: what keeps each temporary below 32 MiB.

    Raises:
        ValueError: rows that are no matrix, or not finite.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0]])
        >>> [(t.first, t.second, t.cosines.tolist()) for t in cosine_tiles(rows, 2)]
        [(0, 0, [[-inf, 0.0], [-inf, -inf]]), (0, 2, [[1.0], [0.0]]), (2, 2, [[-inf]])]
    """
    if rows.dim() != 2:
        raise ValueError(f"rows: expected [F, D], a row per latent, got {list(rows.shape)}")
    n, step = rows.shape[0], edge or tile_edge(rows.shape[1])
    for i in range(0, n, step):
        left, left_zero = unit_rows(rows[i : i + step])
        for j in range(i, n, step):
            right, right_zero = (left, left_zero) if i == j else unit_rows(rows[j : j + step])
            cosines = (left @ right.T).clamp_(-1, 1)
            if i == j:
                seen = torch.ones_like(cosines, dtype=torch.bool).tril_()
                cosines.masked_fill_(seen, -math.inf)
            cosines[left_zero] = -math.inf
            cosines[:, right_zero] = -math.inf
            yield CosineTile(i, j, cosines)


def zero_rows(rows: torch.Tensor) -> torch.Tensor:
    """Mask of the rows that are all zeros, bool [F].

    >>> zero_rows(torch.tensor([[0.0, 1e-30], [0.0, -0.0]])).tolist()
    [False, True]
    """
    return ~rows.detach().any(1)


def unit_rows(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised rows in fp32, and the mask of zero rows; norms in fp64, where none overflows."""
    high = block.detach().double()
    norms = high.norm(dim=1, keepdim=True)
    if not norms.isfinite().all():
        raise ValueError("rows: expected finite numbers, got NaN or infinity")
    zero = norms[:, 0] == 0
    return (high / norms.masked_fill(norms == 0, 1)).float(), zero
