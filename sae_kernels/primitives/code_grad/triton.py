"""code_grad in Triton: a program takes a few entries of a token, or a token of ragged codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sae_kernels.primitives import checks
from sae_kernels.primitives.decode.triton import (
    block_of_columns,
    entries_of,
    gather_tile,
    kept,
    latents_of,
    load_rows,
)
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    import torch


@triton.jit
def _products(
    grad,
    indices,
    W,
    group_ends,
    token,
    entries,
    present,
    B,
    F,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiplies the rows of some entries of a token with its gradient."""
    # Products are added column by column and only their totals across threads, once per entry.
    latents = latents_of(indices, entries, present, group_ends, F, GROUPS)
    if group_ends is not None:
        group = tl.zeros(entries.shape, tl.int64)
        for g in range(GROUPS):
            group += (latents >= tl.load(group_ends + g)).to(tl.int64)
        own_grad = (group * B + token) * D
    partial = tl.zeros((entries.shape[0], BLOCK), tl.float32)
    for first in range(0, D, BLOCK):
        columns, inside = block_of_columns(first, D, BLOCK)
        rows = load_rows(W, latents, present, columns, inside, D)
        if group_ends is not None:
            mask = (latents >= 0)[:, None] & inside[None, :]
            partial += rows * tl.load(grad + own_grad[:, None] + columns[None, :], mask, 0)
        else:
            row = tl.load(grad + token * D + columns, mask=inside, other=0)
            partial += rows * row[None, :]
    return tl.where(latents < 0, float("nan"), tl.sum(partial, 1))


@triton.jit
def _code_grad_kernel(
    grad,
    indices,
    W,
    group_ends,
    offsets,
    out,
    B,
    F,
    K,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    codes = (grad, indices, W, group_ends)
    if offsets is None:
        parts = tl.cdiv(K, ROWS)
        token = (tl.program_id(0) // parts).to(tl.int64)
        nth = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
        at = token * K + nth
        total = _products(*codes, token, at, nth < K, B, F, D, GROUPS, BLOCK)
        tl.store(out + at, total, mask=nth < K)
    else:
        token = tl.program_id(0).to(tl.int64)
        start, count = entries_of(offsets, token, K)
        for first in range(0, count, ROWS):
            nth = first + tl.arange(0, ROWS)
            at = start + nth
            total = _products(*codes, token, at, nth < count, B, F, D, GROUPS, BLOCK)
            tl.store(out + at, total, mask=nth < count)


def run(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiplies every selected row with its token's gradient."""
    B, K, (F, D) = checks.n_tokens(indices, offsets), kept(indices, offsets), W.shape
    rows, columns, warps = gather_tile(K, D)
    # Past the last offset nothing is an entry: zero, so that nobody reads what memory held.
    out = grad.new_empty(indices.shape) if offsets is None else grad.new_zeros(indices.shape)
    programs = B if offsets is not None else B * -(-K // rows)
    _code_grad_kernel[(programs,)](
        grad.contiguous(),
        indices.contiguous(),
        W.contiguous(),
        packed(group_ends),
        packed(offsets),
        out,
        B,
        F,
        K,
        D=D,
        GROUPS=1 if group_ends is None else group_ends.shape[0],
        ROWS=rows,
        BLOCK=columns,
        num_warps=warps,
    )
    return out
