"""The fastest gather that is easy to write: what the L2 cache gives, for the floors.

Apart from the package's own kernels on purpose, which are measured against it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

_IN_FLIGHT = 16  # rows


@triton.jit
def _gather_sum_kernel(
    table, indices, out, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, D, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for begin in range(0, K, ROWS):
            rows = tl.load(indices + token * K + begin + tl.arange(0, ROWS)).to(tl.int64)
            total += tl.load(table + rows[:, None] * D + columns[None, :]).to(tl.float32)
        tl.store(out + token * D + columns, tl.sum(total, 0))


def gather_sum(table: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out[b] = sum_j table[indices[b, j]]``; K a multiple of 16, widths of 256 columns."""
    (tokens, K), D = indices.shape, table.shape[1]
    if K % _IN_FLIGHT or D % 256:
        raise ValueError(f"expected K a multiple of {_IN_FLIGHT} and D of 256, got {K} and {D}")
    _gather_sum_kernel[(tokens,)](
        table, indices, out, K=K, D=D, ROWS=_IN_FLIGHT, BLOCK=256, num_warps=4
    )
    return out
