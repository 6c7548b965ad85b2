"""row_sqnorm in Triton: the gradient of the row update, squared and summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sae_kernels.primitives.row_grad.triton import block_of, rest_of
from sae_kernels.primitives.row_update.triton import (
    gradient_rows,
    load_param,
    packed_parts,
    squares,
    tile_of,
)
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    from sae_kernels.primitives.terms import Gradient


@triton.jit
def _loaded(param, high, latents, wanted, first, block, width):
    rows = latents.to(tl.int64) * width + first
    return load_param(param, high, rows, block[0], wanted[:, None] & block[1][None, :])


@triton.jit
def _row_sqnorm(
    out,
    param,
    high,
    parts,
    F,
    width,
    part,
    NORM: tl.constexpr,
    TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    LATENTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
):
    # One number per program: those of a row are added up in order by whoever launched this.
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    wanted, first = latents < F, tl.program_id(1).to(tl.int64) * part
    block, rest = block_of(first, part, width, COLUMNS), None
    if REST:
        rest = rest_of(first, part, width, COLUMNS, REST)
    weights = (None, None)
    if (NORM == "unit") | (parts[1] is not None):
        weights = (_loaded(param, high, latents, wanted, first, block, width), None)
        if REST:
            weights = (weights[0], _loaded(param, high, latents, wanted, first, rest, width))
    grad, more = gradient_rows(
        parts, latents, wanted, first, (block, rest), weights, F, width, TERMS, CHUNK, ENTRIES, NORM
    )
    total = squares(grad, block)
    if REST:
        total += squares(more, rest)
    at = tl.program_id(1).to(tl.int64) * F + latents
    tl.store(out + at, total, mask=wanted)


def run(
    param: torch.Tensor, gradient: Gradient, high: torch.Tensor | None, norm: str, slices: int
) -> torch.Tensor:
    """Sums the squares of every row's blocks, then of the blocks."""
    F, width = param.shape
    param = param.contiguous()
    high = packed(high)
    parts, constants = packed_parts(gradient, param, high)
    tile, part = tile_of(width, norm, slices)
    count = -(-width // part)
    out = torch.empty((count, F), dtype=torch.float32, device=param.device)
    _row_sqnorm[(-(-F // tile.latents), count)](
        out, param, high, parts, F, width, part, NORM=norm, **constants, **tile.constants()
    )
    return out.sum(0)
