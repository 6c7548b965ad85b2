"""code_grad in Triton: a few entries of a token to a program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sae_kernels.primitives.decode.triton import (
    block_of_columns,
    gather_tile,
    latents_of,
    load_rows,
)
from sae_kernels.tensors import packed

if TYPE_CHECKING:
    import torch


@triton.jit
def _code_grad_kernel(
    grad,
    indices,
    W,
    group_ends,
    out,
    squares,
    B,
    F,
    K: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Products are added column by column and only their totals across threads, once per entry.
    # The gradient of a token is read here anyway, so its squared length can come along.
    parts: tl.constexpr = (K + ROWS - 1) // ROWS
    token = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    entries = part * ROWS + tl.arange(0, ROWS)
    latents = latents_of(indices, token * K + entries, entries < K, group_ends, F, GROUPS)
    if group_ends is not None:
        group = tl.zeros((ROWS,), tl.int64)
        for g in range(GROUPS):
            group += (latents >= tl.load(group_ends + g)).to(tl.int64)
        own_grad = (group * B + token) * D
    partial = tl.zeros((ROWS, BLOCK), tl.float32)
    lengths = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, D, BLOCK):
        columns, inside = block_of_columns(first, D, BLOCK)
        rows = load_rows(W, latents, entries < K, columns, inside, D)
        if group_ends is not None:
            mask = (latents >= 0)[:, None] & inside[None, :]
            partial += rows * tl.load(grad + own_grad[:, None] + columns[None, :], mask, 0)
        else:
            row = tl.load(grad + token * D + columns, mask=inside, other=0)
            partial += rows * row[None, :]
            lengths += row * row
    total = tl.where(latents < 0, float("nan"), tl.sum(partial, 1))
    tl.store(out + token * K + entries, total, mask=entries < K)
    if squares is not None:
        tl.store(squares + token, tl.sum(lengths, 0), mask=part == 0)


def run(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
) -> torch.Tensor:
    """Multiplies every selected row with its token's gradient."""
    out = grad.new_empty(indices.shape)
    launch(grad, indices, W, group_ends, out, None)
    return out


def launch(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
    out: torch.Tensor,
    squares: torch.Tensor | None,
) -> None:
    """Fills ``out`` [B, K] and, where it is asked for, ``squares`` [B], the rows' ``|grad|^2``."""
    (B, K), (F, D) = indices.shape, W.shape
    rows, columns, warps = gather_tile(K, D)
    _code_grad_kernel[(B * triton.cdiv(K, rows),)](
        grad.contiguous(),
        indices.contiguous(),
        W.contiguous(),
        packed(group_ends),
        out,
        squares,
        B,
        F,
        K=K,
        D=D,
        GROUPS=1 if group_ends is None else group_ends.shape[0],
        ROWS=rows,
        BLOCK=columns,
        num_warps=warps,
    )
