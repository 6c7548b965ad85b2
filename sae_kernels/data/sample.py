"""Samples of rows from everywhere in a source, and what they tell of the rows' norms."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.data.windows import permutation

if TYPE_CHECKING:
    from sae_kernels.data.rows import RowSource

SAMPLE = 16384  # rows that tell scale, b_dec and norms closely enough
_RUN = 16  # rows read together
_BINS = 12
_QUANTILES = {"p1": 0.01, "median": 0.5, "p99": 0.99, "p99_9": 0.999}


def sample_rows(source: RowSource, n: int = SAMPLE, seed: int = 0) -> Tensor:
    """n rows [n, D] from everywhere in a source, in its order, or all if there are fewer.

    The source is divided evenly and from each part a run of up to 16 consecutive rows is read, at a
    random place, so that all shards and all kinds of text take part, in whatever order they are
    stored.

    Raises:
        ValueError: an empty source, or n below 1.

    Example:
        >>> from sae_kernels.data import TensorRows
        >>> rows = sample_rows(TensorRows(torch.arange(1000.0)[:, None]), 32)
        >>> len(rows), bool(rows[0] < 500 <= rows[16])
        (32, True)
    """
    total = source.n_tokens
    if n < 1 or total < 1:
        raise ValueError(f"expected at least one row to sample, got {n} of {total}")
    if total < 2 * n:
        kept = permutation(total, seed, "sample")[:n].sort().values
        rows = source.rows(0, total).activations
        return rows[kept.to(rows.device)]
    parts = -(-n // _RUN)
    places = torch.rand(parts, generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = pairwise(total * part // parts for part in range(parts + 1))
    runs = []
    for part, (place, (start, stop)) in enumerate(zip(places, bounds, strict=True)):
        length = n * (part + 1) // parts - n * part // parts
        start += int(place * (stop - start - length + 1))
        runs.append(source.rows(start, start + length).activations)
    return torch.cat(runs)


class Concentration(NamedTuple):
    """How much of the variance few rows carry: ``d_i = |x_i - mean(x)|^2`` over its sum.

    Attributes:
        thousandth: the part that the largest thousandth of the rows carries, at least one row.
        rows_of_half: the number of rows that carry half of it, the largest first.
    """

    thousandth: float
    rows_of_half: int


def concentration(rows: Tensor) -> Concentration:
    """How much of the variance of rows [n, D] few of them carry; NaN and 0 without variance.

    Example:
        >>> rows = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
        >>> rows[0] *= 1000
        >>> concentration(rows).rows_of_half
        1
    """
    x = rows.double()
    d = (x - x.mean(0)).square().sum(1).sort(descending=True).values
    part = d.cumsum(0) / d.sum()
    largest = -(-len(rows) // 1000)
    return Concentration(float(part[largest - 1]), int((part < 0.5).sum()) + 1 if d[0] else 0)


@dataclass(frozen=True)
class NormSummary:
    """The norms of a sample of rows.

    Attributes:
        n_rows: rows of the sample.
        zeros: rows among them that are zero.
        quantiles: norms by name: min, p1, median, p99, p99_9, max.
        bins: (from, to, rows) of each bin of the histogram of the norms that are not zero; the
            edges grow by a constant factor.
        concentration: how much of the variance few rows carry.
    """

    n_rows: int
    zeros: int
    quantiles: dict[str, float]
    bins: tuple[tuple[float, float, int], ...]
    concentration: Concentration

    @classmethod
    def of(cls, rows: Tensor) -> NormSummary:
        """The summary of finite rows [n, D].

        Example:
            >>> summary = NormSummary.of(torch.tensor([[1.0], [-2.0], [4.0], [0.0]]))
            >>> summary.zeros, summary.quantiles["max"], sum(n for *_, n in summary.bins)
            (1, 4.0, 3)
        """
        norms = rows.double().norm(dim=1).sort().values
        found = norms[norms > 0]
        return cls(
            len(norms),
            len(norms) - len(found),
            {
                "min": float(norms[0]),
                **{name: float(norms.quantile(q)) for name, q in _QUANTILES.items()},
                "max": float(norms[-1]),
            },
            _histogram(found) if len(found) else (),
            concentration(rows),
        )


def _histogram(norms: Tensor) -> tuple[tuple[float, float, int], ...]:
    """Bins of sorted positive norms."""
    low, high = float(norms[0]), float(norms[-1])
    if low == high:
        return ((low, high, len(norms)),)
    edges = torch.logspace(0, 1, _BINS + 1, base=high / low, dtype=torch.float64) * low
    below = torch.searchsorted(norms.cpu(), edges[1:-1]).tolist()
    counts = [b - a for a, b in pairwise([0, *below, len(norms)])]
    ends = [low, *edges[1:-1].tolist(), high]
    return tuple((a, b, n) for (a, b), n in zip(pairwise(ends), counts, strict=True))
