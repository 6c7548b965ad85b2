"""fp32 weights split into bf16 halves for the products and int16 halves for the optimizer.

``bits = (high << 16) + low`` with a signed low half: the high half is then the bf16 nearest to the
weight (ties away from zero) and not its lower neighbour, which a cut of the bits would give and
which would bias every product. All weights come back exactly, except that NaN comes back as one
NaN: with another payload it could look like an infinity or a zero in the high half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 1 << 24  # elements whose bits are held in between, so that no second fp32 matrix is


def cut(values: torch.Tensor, added: torch.Tensor | int) -> torch.Tensor:
    """Adds to the bits of fp32 values and returns their upper halves as bf16."""
    bits = values.view(torch.int32) + added
    upper = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    # A carry into the exponent's or the sign's bits would turn NaN into a number.
    return torch.where(values.isnan(), torch.nan, upper)


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits fp32 values into bf16 high halves and int16 low ones."""
    high = torch.empty_like(values, dtype=torch.bfloat16)
    low = torch.empty_like(values, dtype=torch.int16)
    for rows in _chunks(values):
        part = values[rows]
        high[rows] = cut(part, 0x8000)
        low[rows] = part.view(torch.int32).to(torch.int16).masked_fill(part.isnan(), 0)
    return high, low


def joined(
    high: torch.Tensor, low: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Joins what :func:`split` took apart to fp32 values again, in ``out`` if it is given."""
    values = torch.empty_like(low, dtype=torch.float32) if out is None else out
    for rows in _chunks(low):
        upper = high[rows].view(torch.int16).to(torch.int32) << 16
        values[rows] = (upper + low[rows]).view(torch.float32)
    return values


def _chunks(matrix: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK * matrix.shape[0] // max(1, matrix.numel()))
    for begin in range(0, matrix.shape[0], step):
        yield slice(begin, begin + step)
