"""BatchTopK over ranks: the largest entries of a batch by one threshold, found by histograms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae_kernels.distributed.collectives import Collectives

_DIGIT = 11  # bits of a number that one histogram is of: 16 KB of counts
_NAN = 0x7FFFFFFF


def largest(
    keys: torch.Tensor, places: torch.Tensor, count: int, ranks: Collectives
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries are among the ``count`` largest of all ranks, and how many entries there are.

    Args:
        keys: fp32 [N], positive or NaN; NaN is the largest.
        places: int64 [N], the order of equal keys: the lower first; no two of all ranks are equal.
        count: how many are kept, or all if there are fewer.
        ranks: those that have the other entries.

    Returns:
        bool [N], and the number of entries of all ranks, int64.

    Example:
        >>> from sae_kernels.distributed.collectives import Collectives
        >>> keys, places = torch.tensor([2.0, 5.0, 2.0]), torch.tensor([7, 0, 3])
        >>> kept, found = largest(keys, places, 2, Collectives(None))
        >>> kept.tolist(), int(found)
        ([False, True, True], 3)
    """
    # The bits of positive numbers sort like them.
    bits = torch.where(keys.isnan(), _NAN, keys.float().view(torch.int32).long())
    found = ranks.counted(torch.tensor(len(bits), device=bits.device), "histograms")
    if int(found) <= count:
        return torch.ones_like(keys, dtype=torch.bool), found
    if not count:
        return torch.zeros_like(keys, dtype=torch.bool), found
    cut, larger = _kth(bits, count, 31, ranks)
    kept, tied = bits > cut, bits == cut
    ties = ranks.counted(tied.sum(), "histograms")
    if count - larger < int(ties):
        most = int(ranks.gather(places.max() if len(places) else found * 0, "histograms").max())
        first, _ = _kth(most - places[tied], count - larger, max(1, most.bit_length()), ranks)
        tied &= most - places >= first
    return kept | tied, found


def _kth(values: torch.Tensor, k: int, bits: int, ranks: Collectives) -> tuple[int, int]:
    """The k-th largest of all ranks' numbers of so many bits, and how many are larger.

    It is found digit by digit from the highest, by the histogram of those that share the digits
    before.
    """
    prefix, larger = 0, 0
    for shift in range(-(-bits // _DIGIT) * _DIGIT - _DIGIT, -1, -_DIGIT):
        digits = (values >> shift) & ((1 << _DIGIT) - 1)
        counts = ranks.counted(digits.bincount(minlength=1 << _DIGIT), "histograms")
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, k - larger))
        larger += int(from_top[place - 1]) if place else 0
        digit = (1 << _DIGIT) - 1 - place
        prefix = prefix << _DIGIT | digit
        values = values[digits == digit]
    return prefix, larger
