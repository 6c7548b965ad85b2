"""Rows of activations: what a source of them offers, and a tensor as one."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Consecutive rows of a source; read-only, as they may be views of the source itself."""

    activations: Tensor  # [n, D]
    tokens: Tensor | None = None  # int32 [n]
    documents: Tensor | None = None  # int32 [n]


class RowSource(Protocol):
    """What a source of activations offers: its size and any run of consecutive rows."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def rows(self, start: int, stop: int) -> Rows: ...


class TensorRows:
    """A floating point tensor [N, D] in memory as a row source."""

    def __init__(self, activations: Tensor) -> None:
        if activations.ndim != 2 or not activations.is_floating_point():
            raise ValueError(
                "expected floating point activations [N, D], "
                f"got {activations.dtype} {list(activations.shape)}; flatten to one row a token"
            )
        self._activations = activations.detach()
        self.n_tokens, self.d_in = activations.shape
        self.dtype, self.device = activations.dtype, activations.device

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, as a view."""
        return Rows(self._activations[start:stop])

    def take(self, rows: Tensor, out: Tensor) -> None:
        """Copies any rows in any order, by their numbers on the same device."""
        torch.index_select(self._activations, 0, rows, out=out)


def combined(digests: list[str]) -> str:
    """A short name for what has these checksums, in this order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def estimate_scale(source: RowSource | Tensor, n: int = 16384) -> float:
    """sqrt(D) over the mean norm of the first `n` rows: times this, rows have norm sqrt(D).

    Raises:
        ValueError: no rows, or rows without a positive finite norm.

    >>> estimate_scale(torch.full((8, 4), 0.5))
    2.0
    """
    source = TensorRows(source) if isinstance(source, Tensor) else source
    n = min(n, source.n_tokens)
    if n < 1:
        raise ValueError(f"expected at least one row to estimate the scale from, got {n}")
    total = 0.0
    for start in range(0, n, 4096):
        rows = source.rows(start, min(start + 4096, n)).activations
        total += rows.float().norm(dim=1).sum(dtype=torch.float64).item()
    if not 0 < total < math.inf:
        raise ValueError(f"expected activations with a positive finite norm, got {total / n}")
    return math.sqrt(source.d_in) * n / total
