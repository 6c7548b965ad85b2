"""Samples that are spread over a text whose length is not known."""

from __future__ import annotations

from itertools import groupby
from random import Random
from typing import TYPE_CHECKING, TypeVar

import torch

from sae_kernels.data.windows import permutation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sae_kernels.harvest.chunks import Chunk

T = TypeVar("T")


def spread(items: Iterable[T], size: Callable[[T], int], budget: int, seed: int) -> list[T]:
    """One random item of every stretch of equal length, in order, of at most ``budget`` in all.

    The items are gone through once and only those in the result are held. Stretches begin with one
    item; whenever those held exceed the budget, stretches double. So the result has about half the
    budget or more, if there is as much, from everywhere in the items, and is the same for the same
    seed. One item is held even if it exceeds the budget.

    Example:
        >>> spread(range(1000), lambda item: 1, budget=8, seed=0)
        [40, 186, 310, 402, 583, 723, 847, 993]
    """
    random = Random(seed)
    taken: list[tuple[float, int, T]] = []  # with the lowest number drawn in its stretch
    total, stretch = 0, 1
    for number, item in enumerate(items):
        drawn = (random.random(), number, item)
        if taken and taken[-1][1] // stretch == number // stretch:
            if drawn > taken[-1]:
                continue
            total -= size(taken.pop()[2])
        taken.append(drawn)
        total += size(item)
        while total > budget and len(taken) > 1:
            stretch *= 2
            stretches = groupby(taken, lambda each, n=stretch: each[1] // n)  # type: ignore[misc]
            taken = [min(some) for _, some in stretches]
            total = sum(size(item) for *_, item in taken)
    return [item for *_, item in taken]


def some_rows(chunks: list[Chunk], n: int, seed: int) -> list[Chunk]:
    """The chunks with only n of their rows kept, drawn at random, or all if there are fewer."""
    counts = [chunk.rows for chunk in chunks]
    drawn = torch.zeros(sum(counts), dtype=torch.bool)
    drawn[permutation(len(drawn), seed, "sample")[:n]] = True
    some = []
    for chunk, own in zip(chunks, drawn.split(counts), strict=True):
        kept = chunk.kept.clone()
        kept[chunk.kept] = own
        some.append(chunk._replace(kept=kept, rows=int(own.sum())))
    return [chunk for chunk in some if chunk.rows]
