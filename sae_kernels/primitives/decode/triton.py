"""decode in Triton, and functions for all kernels that gather decoder rows.

A gather is as fast as the number of loads in flight. So a program takes several rows of a block of
columns at a time, adds each to its own partial sum, and adds those up once at the end: nothing but
the loads is waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives import checks
from sae_kernels.primitives.tensors import packed
from sae_kernels.primitives.terms import tree_sum, values_by_block

if TYPE_CHECKING:
    import torch

_MOST_WARPS = 8
_ELEMENTS = 32  # of a tile, in each thread
_NARROWEST, _WIDEST = 64, 256  # columns; in bf16 the narrowest are the 128 bytes of a cache line
_MOST_ROWS = 16  # gathered at a time, where entries come in a loop


class GatherTile(NamedTuple):
    """Rows and columns that a program gathers at a time, and its warps."""

    rows: int
    columns: int
    warps: int


def tile(rows: int, D: int) -> GatherTile:
    """The tile of a program that gathers ``rows`` rows at a time.

    Columns come in blocks that divide D where a power of two of at least a cache line does: every
    usual width then leaves no lane idle, and padding to a power of two would waste up to a half.
    Other widths have a masked last block. Warps follow the tile, so a thread holds the same share
    of it for every K and D: the one that lets a multiprocessor hold several programs' registers.
    """
    widest = min(_WIDEST, _MOST_WARPS * 32 * _ELEMENTS // rows)
    exact = D & -D  # the largest power of two that divides D
    columns = min(widest, exact if exact >= _NARROWEST else max(16, gpu.next_power_of_two(D)))
    warps = min(_MOST_WARPS, max(1, rows * columns // (32 * _ELEMENTS)))
    return GatherTile(rows, columns, warps)


def gather_tile(K: int, D: int) -> GatherTile:
    """The tile of the kernels that go through the entries or the columns in a loop."""
    return tile(min(_MOST_ROWS, gpu.next_power_of_two(K)), D)


def kept(indices: torch.Tensor, offsets: torch.Tensor | None) -> int:
    """K of codes; for ragged ones, whose kernels read the offsets, a number that fills a tile."""
    return indices.shape[1] if offsets is None else _MOST_ROWS


@triton.jit
def entries_of(offsets, token, K):
    """The first entry of a token and its number of entries."""
    if offsets is None:
        return token * K, K
    else:
        first = tl.load(offsets + token)
        return first.to(tl.int64), tl.load(offsets + token + 1) - first


@triton.jit
def latents_of(indices, entries, present, group_ends, F, GROUPS: tl.constexpr):
    """Latents of entries, for addressing; -1 where there is none to be read.

    Nothing can be raised from here, so the kernels make NaN of it. A latent above the last group's
    end has no group and is treated alike.
    """
    end = F
    if group_ends is not None:
        end = tl.minimum(F, tl.load(group_ends + GROUPS - 1, mask=GROUPS > 0, other=0))
    latents = tl.load(indices + entries, mask=present, other=-1)
    return tl.where((latents >= 0) & (latents < end), latents, -1).to(tl.int64)


@triton.jit
def block_of_columns(first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns from ``first`` on, and which exist: all, known ahead, where the blocks divide D."""
    columns = first + tl.arange(0, BLOCK)
    inside = columns < D if D % BLOCK else tl.full((BLOCK,), True, tl.int1)
    return columns, inside


@triton.jit
def load_rows(W, latents, wanted, columns, inside, D: tl.constexpr):
    """A block of columns of gathered rows in fp32; 0 where a row is not wanted or no latent."""
    rows = W + latents[:, None] * D + columns[None, :]
    mask = (wanted & (latents >= 0))[:, None] & inside[None, :]
    return tl.load(rows, mask=mask, other=0).to(tl.float32)


@triton.jit
def _decode_kernel(
    values,
    indices,
    W,
    b_dec,
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
    # Prefix sums of groups are continued, not begun anew: a row is read by its own group only.
    # An index that is no latent counts as a NaN row of the first group, so every prefix shows it.
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)
    columns, inside = block_of_columns(tl.program_id(0) % blocks * BLOCK, D, BLOCK)
    start, count = entries_of(offsets, token, K)
    partial = tl.zeros((ROWS, BLOCK), tl.float32)
    begin = -1
    for g in range(GROUPS):
        end = F
        if group_ends is not None:
            end = tl.load(group_ends + g)
        for first in range(0, count, ROWS):
            entries = first + tl.arange(0, ROWS)
            present = entries < count
            latents = latents_of(indices, start + entries, present, group_ends, F, GROUPS)
            coef = tl.load(values + start + entries, mask=present, other=0)
            added = (coef != 0) & (latents >= begin) & (latents < end)
            rows = load_rows(W, latents, added, columns, inside, D)
            coef = tl.where(latents < 0, float("nan"), coef)
            partial += tl.where(added, coef, 0)[:, None] * rows
        x_hat = tl.sum(partial, 0)
        if b_dec is not None:
            x_hat += tl.load(b_dec + columns, mask=inside, other=0)
        tl.store(out + (g * B + token) * D + columns, x_hat, mask=inside)
        begin = end


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
    blocks: int = 1,
) -> torch.Tensor:
    """Decodes every token; a program takes a block of columns. Each block of latents is a pass."""
    if blocks > 1:
        each = values_by_block(values, indices, W.shape[0], blocks)
        total = tree_sum([run(own, indices, W, None, group_ends, offsets) for own in each])
        return total if b_dec is None else total + b_dec
    B, K, (F, D) = checks.n_tokens(values, offsets), kept(indices, offsets), W.shape
    groups = 1 if group_ends is None else group_ends.shape[0]
    rows, columns, warps = gather_tile(K, D)
    out = values.new_empty((groups, B, D))
    _decode_kernel[(B * -(-D // columns),)](
        values.contiguous(),
        indices.contiguous(),
        W.contiguous(),
        packed(b_dec),
        packed(group_ends),
        packed(offsets),
        out,
        B,
        F,
        K,
        D=D,
        GROUPS=groups,
        ROWS=rows,
        BLOCK=columns,
        num_warps=warps,
    )
    return out[0] if group_ends is None else out
