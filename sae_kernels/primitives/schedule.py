"""Sizes of the candidate lists on GPUs, and the passes in which columns are scored.

This is arithmetic on the host. A row's threshold is the k-th largest of what it has seen, so it is
never above the true one. It is first found in a sample of single columns, spread evenly and as many
as a list holds. After that the passes may grow with what has been seen: each lets about the same
number of entries through to a list that was just cut back to its k best.
"""

from __future__ import annotations

import functools
import itertools
import math

from sae_kernels.gpu import next_power_of_two

LARGEST_K = 1024
# Entries a row's list holds. Below: room for chance when k is small; above: what one block sorts.
LEAST_CAPACITY, MOST_CAPACITY = 256, 4096
_LARGEST_GROWTH = 4.0
_LIST_BYTES = 32 << 20  # lists that stay in the cache of every GPU the kernels are for
_ENTRY_BYTES = 8
_GOLDEN = (math.sqrt(5) - 1) / 2


def capacity(k: int) -> int:
    """Entries a row's list holds: k, twice what a pass lets through, and room for chance."""
    return min(max(next_power_of_two(8 * k), LEAST_CAPACITY), MOST_CAPACITY)


def rows_at_once(capacity: int) -> int:
    """Number of rows whose lists fit into the cache together."""
    return _LIST_BYTES // (_ENTRY_BYTES * capacity)


def column_passes(n_tiles: int, columns: int, k: int, capacity: int) -> list[tuple[int, int]]:
    """The passes over all tiles of ``columns`` latents, as ranges of positions in the visit.

    Where the sample is a good part of all, there is one. Else the first is one tile, which any list
    has room for: the visit begins with the first latents, and where latents are sorted these are
    the best: what they leave is a threshold for the rest. Each of the others is expected to bring a
    list from the k best to the middle of what is left above.
    """
    growth = min(_LARGEST_GROWTH, (capacity + k) / (2 * k))
    if n_tiles * columns <= growth * capacity:
        return [(0, n_tiles)]
    ends = [0, 1]
    while ends[-1] < n_tiles:
        seen = max(ends[-1], capacity / columns)  # by passes or in the sample
        end = int(ends[-1] + (growth - 1) * seen)
        ends.append(min(n_tiles, max(ends[-1] + 1, end)))
    return list(itertools.pairwise(ends))


@functools.cache
def stride(n_tiles: int) -> int:
    """Step of the visit of all tiles: at a position comes tile ``position * stride % n_tiles``.

    Latents are often sorted, by frequency or in nested groups, and whatever is visited first must
    stand for the rest or lists overflow. Steps of the golden ratio spread every prefix of the
    visit evenly. A stride that has no factor in common with ``n_tiles`` reaches every tile once;
    of those nearby, the one whose continued fraction is most like the golden ratio's is taken.
    Unlike a table of bit-reversed numbers it need not be copied to the device.
    """
    nearest = round(n_tiles * _GOLDEN)
    nearby = range(max(1, nearest - 16), nearest + 17)
    return min(
        (step for step in nearby if math.gcd(step, n_tiles) == 1),
        key=lambda step: _largest_quotient(n_tiles, step),
    )


def _largest_quotient(a: int, b: int) -> int:
    largest = 0
    while b:
        largest = max(largest, a // b)
        a, b = b, a % b
    return largest
