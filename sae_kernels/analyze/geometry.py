"""Geometry of latents: nearest neighbours and duplicates by cosine similarity."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.analyze.cosines import cosine_tiles, n_tiles, zero_rows
from sae_kernels.analyze.groups import UnionFind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_kernels.analyze.cosines import CosineTile

CURVE = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 50


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """Nearest-neighbour cosines and groups of duplicates among F rows.

    Attributes:
        within: fp32 [F], the largest cosine to another row of the same expert.
        across: fp32 [F], the same to a row of another expert. Both are -inf where there is no
            such row, and for rows of zeros.
        zero: bool [F], rows of zeros.
        threshold: from which cosine on two rows are duplicates.
        groups: int64 [F], the lowest row of each row's group: those that a chain of duplicates
            joins.
        n_spanning: groups with rows of more than one expert.
    """

    within: torch.Tensor
    across: torch.Tensor
    zero: torch.Tensor
    threshold: float
    groups: torch.Tensor
    n_spanning: int

    @property
    def nearest(self) -> torch.Tensor:
        """The largest cosine of each row to any other row, [F]."""
        return torch.maximum(self.within, self.across)

    @property
    def n_distinct(self) -> int:
        """Number of rows after removing duplicates (one per group stays) and zero rows."""
        return int((self.groups.bincount() > 0).sum()) - int(self.zero.sum())

    def values(self, experts: bool) -> dict[str, Any]:
        """Summaries as JSON values; ``within`` and ``across`` only if there are experts."""
        kinds = {"nearest": self.nearest}
        if experts:
            kinds |= {"within": self.within, "across": self.across}
        sizes = self.groups.bincount()
        return {
            "n_zero": int(self.zero.sum()),
            "neighbours": {name: summary(cosines) for name, cosines in kinds.items()},
            "duplicates": {
                "threshold": self.threshold,
                **{name: n_duplicates(cosines, self.threshold) for name, cosines in kinds.items()},
                "n_groups": int((sizes > 1).sum()),
                **({"n_groups_across": self.n_spanning} if experts else {}),
                "largest_group": int(sizes.max()),
                "n_distinct": self.n_distinct,
                "curve": {
                    "thresholds": list(CURVE),
                    **{name: duplicate_curve(cosines) for name, cosines in kinds.items()},
                },
            },
        }


def geometry(
    rows: torch.Tensor,
    experts: torch.Tensor | None = None,
    *,
    threshold: float = 0.9,
    progress: Callable[[int, int], None] | None = None,
) -> Geometry:
    """Finds nearest neighbours and duplicates among all pairs of rows, without an [F, F] matrix.

    Args:
        rows: [F, D], the decoder's (or the encoder's), a row per latent; their norms do not matter.
        experts: whole numbers [F], which expert a latent belongs to; default: all to one.
        threshold: two rows are duplicates if their cosine, in fp32, is at or above it.
        progress: gets how many tiles are done, of how many.

    Raises:
        ValueError: rows that are no matrix, without a row or not finite; experts of another length;
            a threshold outside (0, 1).

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [3.0, 4.0], [2.0, 0.0], [0.0, 0.0]])
        >>> found = geometry(rows, torch.tensor([0, 0, 1, 1]))
        >>> [round(c, 3) for c in found.within.tolist()], found.across.tolist()[0]
        ([0.6, 0.6, -inf, -inf], 1.0)
        >>> found.groups.tolist(), found.n_distinct, found.n_spanning
        ([0, 1, 0, 3], 2, 1)
    """
    if rows.dim() != 2 or not rows.shape[0]:
        raise ValueError(f"rows: expected [F, D], at least one row, got {list(rows.shape)}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a cosine, 0 < threshold < 1, got {threshold}")
    n, device = rows.shape[0], rows.device
    parts = torch.zeros(n, dtype=torch.int64, device=device) if experts is None else experts
    if parts.shape != (n,):
        raise ValueError(f"experts: expected shape [{n}], one per row, got {list(parts.shape)}")
    within = torch.full((n,), -math.inf, device=device)
    across = within.clone()
    groups = UnionFind(n, device)
    total = n_tiles(rows)
    for done, tile in enumerate(cosine_tiles(rows), 1):
        groups.join(*tile.pairs(threshold))
        _raise(within, across, tile, parts)
        if progress is not None:
            progress(done, total)
    spanning = int(groups.spanning(parts).sum())
    return Geometry(within, across, zero_rows(rows), threshold, groups.labels, spanning)


def _raise(
    within: torch.Tensor, across: torch.Tensor, tile: CosineTile, experts: torch.Tensor
) -> None:
    """Raises the largest cosines of both rows of every pair of a tile."""
    m, n = tile.cosines.shape
    one, other = slice(tile.first, tile.first + m), slice(tile.second, tile.second + n)
    same = experts[one, None] == experts[other]
    for nearest, hidden in ((within, ~same), (across, same)):
        cosines = tile.cosines.masked_fill(hidden, -math.inf)
        nearest[one] = torch.maximum(nearest[one], cosines.amax(1))
        nearest[other] = torch.maximum(nearest[other], cosines.amax(0))


def n_duplicates(cosines: torch.Tensor, threshold: float) -> int:
    """Number of latents with a neighbour at or above the threshold."""
    return int((cosines >= threshold).sum())


def duplicate_curve(cosines: torch.Tensor, thresholds: Sequence[float] = CURVE) -> list[float]:
    """The fraction of latents with a neighbour at or above each threshold.

    Example:
        >>> duplicate_curve(torch.tensor([0.4, 0.7, 0.95, -torch.inf]), (0.5, 0.9))
        [0.5, 0.25]
    """
    return [n_duplicates(cosines, threshold) / len(cosines) for threshold in thresholds]


def median(cosines: torch.Tensor) -> float:
    """The median of the finite cosines; NaN if there are none.

    >>> round(median(torch.tensor([0.2, 0.4, -torch.inf])), 3)
    0.3
    """
    known = cosines[cosines.isfinite()].double()
    return float(known.quantile(0.5)) if len(known) else math.nan


def summary(cosines: torch.Tensor) -> dict[str, Any]:
    """Quantiles and a histogram of the finite cosines.

    Example:
        >>> found = summary(torch.tensor([0.2, 0.4, 0.9, -torch.inf]))
        >>> found["n"], round(found["quantiles"]["0.5"], 3), sum(found["histogram"]["counts"])
        (3, 0.4, 3)
    """
    known = cosines[cosines.isfinite()].double().cpu()
    if not len(known):
        return {"n": 0, "mean": None, "quantiles": None, "histogram": None}
    quantiles = known.quantile(known.new_tensor(QUANTILES)).tolist()
    low = min(0.0, math.floor(10 * float(known.min())) / 10)
    edges = torch.linspace(low, 1, _BINS + 1, dtype=torch.float64)
    counts = torch.histc(known, _BINS, low, 1).long().tolist()
    return {
        "n": len(known),
        "mean": float(known.mean()),
        "quantiles": {str(q): value for q, value in zip(QUANTILES, quantiles, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts},
    }
