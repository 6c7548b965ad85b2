"""Row sources: random access to rows of activations, with a tensor as the simplest one."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Consecutive rows of a source; read-only, as they may be views of the source's memory."""

    activations: Tensor  # [n, D]
    tokens: Tensor | None = None  # int32 [n]
    documents: Tensor | None = None  # int32 [n]


class RowSource(Protocol):
    """Activations [n_tokens, d_in] of which any range of consecutive rows can be read."""

    @property
    def n_tokens(self) -> int:
        """Number of rows."""
        ...

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        ...

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, that one excluded; a view of the source or a copy."""
        ...


class TensorRows:
    """A row source of a floating point tensor [N, D], on any device.

    Raises:
        ValueError: a tensor that is not a matrix of floats.
    """

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

    def gather(self, rows: Tensor, out: Tensor) -> None:
        """Copies rows by number (int64 [n] on the same device) to out [n, D]."""
        torch.index_select(self._activations, 0, rows, out=out)


def combined_fingerprint(digests: list[str]) -> str:
    """One fingerprint of several checksums in order: 16 hexadecimal digits of their SHA-256."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def estimate_scale(source: RowSource | Tensor, n: int = 16384) -> float:
    """The factor that scales rows to a mean norm of sqrt(D), estimated from the first `n` rows.

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
