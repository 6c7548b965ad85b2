"""select_batch_topk by a bound: collects all scores above it and selects among them.

One bound serves the whole batch. If enough entries are certainly above it, no entry below it can
matter, so the selection among those above is the exact one; if not, the bound is lowered and the
product done again, down to 0, which every kept entry is above. What finds the entries above a bound
is a backend's select_threshold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.tensors import kept_entries

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.primitives.tensors import Ragged

# Of the guess: batches differ, and a second product costs more than some entries do.
_MARGIN = 0.9
_SAMPLE = 64  # tokens from which the first bound is guessed


class ScoreSource(NamedTuple):
    """The scores of a batch, which are only ever computed as far as they are above a bound.

    Attributes:
        find: select_threshold of a backend.
        x, W, b, rank_scale: as of select_batch_topk.
    """

    find: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], Ragged]
    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor | None
    rank_scale: torch.Tensor | None

    def above(self, bound: float) -> tuple[Ragged, torch.Tensor]:
        """Finds the entries whose key may be above a bound, and their keys."""
        found = self.find(self.x, self.W, self.b, self._bounds(bound))
        values, indices, _ = found
        if self.rank_scale is None:
            return found, values
        return found, values * self.rank_scale[indices.long()]

    def _bounds(self, bound: float) -> torch.Tensor:
        dtype, scale = accumulator(self.x.dtype), self.rank_scale
        bounds = self.x.new_full((self.W.shape[0],), bound, dtype=dtype)
        if scale is None:
            return bounds
        # The key of an infinite score may be NaN, that of a NaN scale is: finite bounds, 0 for NaN.
        # (A number over a tensor would be its reciprocal times the number, which may be infinite.)
        least = torch.where(scale <= 0, torch.inf, bounds / scale).nan_to_num(0.0)
        # A quotient below the normal numbers has lost digits; a lower bound is as good.
        return torch.where(least < torch.finfo(dtype).smallest_normal, 0, least)


def select(scores: ScoreSource, count: int, start: torch.Tensor | None) -> Ragged:
    """Selects with one bound after the other until the count certifies it."""
    dtype = accumulator(scores.x.dtype)
    guess = math.nan if start is None else float(start.to(dtype))
    if not 0 < guess < math.inf:  # none was given, or no number to go by
        guess = _guess(scores, count)
    # A product with the scale may round up an entry that its own bound left out.
    slack = 1.0 if scores.rank_scale is None else 1 + 4 * torch.finfo(dtype).eps
    for bound in (_MARGIN * guess, guess / 2, guess / 4, 0.0):
        bound = max(bound, 0.0)
        found, key = scores.above(bound)
        if bound == 0:
            break
        if key.numel() >= count and int((~(key <= bound * slack)).sum()) >= count:
            break
    return kept_entries(found, _largest(key, count))


def _guess(scores: ScoreSource, count: int) -> float:
    """Estimates the last kept key from a few tokens of the batch."""
    B = scores.x.shape[0]
    sample = scores.x[:: max(1, B // _SAMPLE)]
    _, key = scores._replace(x=sample).above(0.0)
    wanted = math.ceil(count * sample.shape[0] / max(1, B))
    if not 1 <= wanted <= key.numel():
        return 0.0
    return float(key.topk(wanted, sorted=True).values[-1])


def _largest(key: torch.Tensor, count: int) -> torch.Tensor:
    """Which entries are the first ``count``; ties to the earlier ones."""
    kept = ~(key <= 0)
    if count < key.numel():
        # Bits of positive numbers have their order, and NaN, made one of them, is last.
        rank = torch.where(key.isnan(), torch.nan, key)
        rank = rank.view(torch.int64 if key.dtype == torch.float64 else torch.int32)
        rank = torch.where(kept, rank, 0)
        last = _nth_largest(rank, count) if count else rank.max() + 1
        above, tied = rank > last, rank == last
        kept &= above | (tied & (tied.cumsum(0) <= count - above.sum()))
    return kept


def _nth_largest(rank: torch.Tensor, n: int) -> torch.Tensor:
    # On a GPU a sort is spread over all of it, and torch's kthvalue is one block's.
    nth = rank.numel() - n
    return rank.sort().values[nth] if rank.is_cuda else rank.kthvalue(nth + 1).values
