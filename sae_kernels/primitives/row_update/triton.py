"""row_update in Triton: a program updates some columns of a latent's row from gather to copy.

Without a norm policy a row's columns have nothing to do with each other, and a program takes a
block of them. Where slices are projected and renormalised it takes a whole slice, so that the row
is read and written once and its gradient stays in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from sae_kernels.primitives.row_grad.triton import (
    RowTile,
    block_of,
    blocks,
    gather,
    packed_terms,
    pointers,
    rest_of,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.primitives.row_update import AdamMatrix
    from sae_kernels.primitives.terms import Gradient


@triton.jit
def load_param(param, high, rows, columns, mask):
    """Loads fp32 weights, joining the halves of a split master."""
    low = tl.load(pointers(param, rows, columns), mask=mask, other=0)
    if param.dtype.element_ty == tl.int16:
        upper = tl.load(pointers(high, rows, columns), mask=mask, other=0)
        bits = (upper.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low.to(tl.int32)
        return bits.to(tl.float32, bitcast=True)
    else:
        return low


@triton.jit
def _with_parts(grad, parts, latents, wanted, first, block, w, F, width):
    """The gradient of the terms and what penalties and dense rows add to a block of columns."""
    _, row_coef, norms, split, dense, slots = parts
    columns, inside = block
    if row_coef is not None:
        at, mask = latents[:, None], wanted[:, None]
        if split is not None:
            at = at * split[0] + ((first + columns) // split[1])[None, :]
            mask = mask & inside[None, :]
        coef = tl.load(row_coef + at, mask=mask, other=0)
        norm = tl.load(norms + at, mask=mask, other=1)
        grad += tl.where(norm > 0, tl.div_rn(coef, norm), 0) * w
    if dense is not None:
        slot = tl.load(slots + latents, mask=wanted, other=-1)
        at = pointers(dense, slot.to(tl.int64) * width + first, columns)
        grad += tl.load(at, mask=(slot >= 0)[:, None] & inside[None, :], other=0)
        misplaced = tl.load(slots + F) >= 0
        grad = tl.where(misplaced, float("nan"), grad)
    return grad


@triton.jit
def gradient_rows(
    parts,
    latents,
    wanted,
    first,
    blocks,
    weights,
    F,
    width,
    TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    NORM: tl.constexpr,
):
    """The gradient of each block of columns; under "unit" without its part along the slice.

    ``weights`` are those of the same columns.
    """
    block, rest = blocks
    w, w_rest = weights
    grad, more = gather(parts[0], latents, wanted, first, blocks, width, TERMS, CHUNK, ENTRIES)
    grad = _with_parts(grad, parts, latents, wanted, first, block, w, F, width)
    if rest is not None:
        more = _with_parts(more, parts, latents, wanted, first, rest, w_rest, F, width)
    if NORM == "unit":
        along = tl.sum(grad * w, 1)[:, None]
        if rest is not None:  # of one latent: a number, which has no layout in registers
            along = tl.sum(tl.sum(grad * w, 1)) + tl.sum(tl.sum(more * w_rest, 1))
            more -= along * w_rest
        grad -= along * w
    return grad, more


@triton.jit
def _touched(parts, latents, wanted, F, TERMS: tl.constexpr):
    """Which latents have any part of a gradient."""
    terms, row_coef, _, split, dense, slots = parts
    touched = latents < 0
    for t in tl.static_range(TERMS):
        offsets = terms[t][0]
        begin = tl.load(offsets + latents, mask=wanted, other=0)
        touched |= tl.load(offsets + latents + 1, mask=wanted, other=0) > begin
    if row_coef is not None:
        if split is None:
            touched |= tl.load(row_coef + latents, mask=wanted, other=0) != 0
        else:
            for nth in range(split[0]):
                at = row_coef + latents * split[0] + nth
                touched |= tl.load(at, mask=wanted, other=0) != 0
    if dense is not None:
        touched |= tl.load(slots + latents, mask=wanted, other=-1) >= 0
        touched |= tl.load(slots + F) >= 0
    return touched


@triton.jit
def _mixed(x):
    # The hash of reference.py, bit by bit.
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _cut(x, added):
    """bf16: the upper halves of fp32 values after something was added to their bits."""
    upper = (x.to(tl.uint32, bitcast=True) + added) >> 16
    # A carry into the exponent's or the sign's bits would turn NaN into a number.
    upper = tl.where(x != x, 0x7FC0, upper)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _store_state(state, rows, columns, new, noise, mask):
    if state.dtype.element_ty == tl.bfloat16:
        new = _cut(new, noise)
    tl.store(pointers(state, rows, columns), new, mask=mask)


@triton.jit
def _store_param(param, copy, rows, block, wanted, new):
    columns, inside = block
    mask = wanted[:, None] & inside[None, :]
    bits = new.to(tl.uint32, bitcast=True)
    at = pointers(param, rows, columns)
    if param.dtype.element_ty == tl.int16:
        low = tl.where(new != new, 0, bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
        tl.store(at, low, mask=mask)
        tl.store(pointers(copy, rows, columns), _cut(new, 0x8000), mask=mask)
    else:
        tl.store(at, new, mask=mask)
        if copy is not None:
            if copy.dtype.element_ty == tl.bfloat16:
                # Nearest, ties to even, by hand: Triton's interpreter would cut.
                new = _cut(new, 0x7FFF + ((bits >> 16) & 1))
            at = pointers(copy, rows, columns)
            tl.store(at, new.to(copy.dtype.element_ty), mask=mask)


@triton.jit
def _state(matrix, rows, block, wanted):
    """Weights of a block of columns in fp32, and moments as they are: bf16 takes less room."""
    param, m, v, copy = matrix
    columns, inside = block
    mask = wanted[:, None] & inside[None, :]
    w = load_param(param, copy, rows, columns, mask)
    old_m = tl.load(pointers(m, rows, columns), mask=mask, other=0)
    old_v = tl.load(pointers(v, rows, columns), mask=mask, other=0)
    return w, old_m, old_v


@triton.jit
def _adam(state, grad, matrix, latents, first, rows, block, wanted, adam, hyper):
    """A block of weights after the step; its moments are written back."""
    w, old_m, old_v = state
    _, m, v, _ = matrix
    columns, inside = block
    mask = wanted[:, None] & inside[None, :]
    beta1, rest1, beta2, rest2, eps = adam
    step = (tl.load(hyper) / tl.load(hyper + 2)).to(tl.float32)
    v_scale = (1 / tl.sqrt(tl.load(hyper + 3))).to(tl.float32)
    grad *= tl.load(hyper + 1).to(tl.float32)
    new_m = beta1 * old_m.to(tl.float32) + rest1 * grad
    new_v = beta2 * old_v.to(tl.float32) + rest2 * (grad * grad)
    noise = tl.zeros((1, 1), tl.uint32)
    if m.dtype.element_ty == tl.bfloat16:
        key = _mixed(tl.load(hyper + 5).to(tl.int64).to(tl.uint32))
        key = _mixed(latents.to(tl.uint32) ^ key)
        noise = _mixed((first + columns).to(tl.uint32)[None, :] ^ key[:, None])
    _store_state(m, rows, columns, new_m, noise & 0xFFFF, mask)
    _store_state(v, rows, columns, new_v, noise >> 16, mask)
    return w - tl.div_rn(step * new_m, tl.sqrt_rn(new_v) * v_scale + eps)


@triton.jit
def squares(x, block):
    """The squared norm of each row's block of columns."""
    return tl.sum(tl.where(block[1][None, :], x * x, 0), 1)


@triton.jit
def _row_update(
    param,
    m,
    v,
    copy,
    parts,
    hyper,
    adam,
    F,
    width,
    part,
    NORM: tl.constexpr,
    LAZY: tl.constexpr,
    TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    LATENTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
):
    # What the row itself holds is loaded before the gather, which has three loads in a chain.
    if tl.load(hyper + 4) != 0:
        return
    matrix = (param, m, v, copy)
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    first = tl.program_id(1).to(tl.int64) * part
    block, rest = block_of(first, part, width, COLUMNS), None
    if REST:
        rest = rest_of(first, part, width, COLUMNS, REST)
    wanted = latents < F
    if LAZY:
        wanted &= _touched(parts, latents, wanted, F, TERMS)
    rows = latents.to(tl.int64) * width + first
    state = _state(matrix, rows, block, wanted)
    weights = (state[0], None)
    if REST:
        more_state = _state(matrix, rows, rest, wanted)
        weights = (state[0], more_state[0])
    grad, more = gradient_rows(
        parts, latents, wanted, first, (block, rest), weights, F, width, TERMS, CHUNK, ENTRIES, NORM
    )
    w = _adam(state, grad, matrix, latents, first, rows, block, wanted, adam, hyper)
    beside = w
    if REST:
        beside = _adam(more_state, more, matrix, latents, first, rows, rest, wanted, adam, hyper)
    if NORM != "none":
        total = squares(w, block)[:, None]
        if REST:
            total = tl.sum(squares(w, block)) + tl.sum(squares(beside, rest))
        norm = tl.sqrt_rn(total)
        longer = norm > (0 if NORM == "unit" else 1)
        scale = tl.where(longer, tl.div_rn(1.0, norm), 1)
        w *= scale
        beside *= scale
    _store_param(param, copy, rows, block, wanted, w)
    if REST:
        _store_param(param, copy, rows, rest, wanted, beside)


@triton.jit
def _row_norms(norms, param, high, F, width, LATENTS: tl.constexpr, COLUMNS: tl.constexpr):
    # Ahead of the update: other programs of the same row would already be writing to it.
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    squares = tl.zeros((LATENTS, COLUMNS), tl.float32)
    for begin in range(0, width, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        mask = (latents < F)[:, None] & (columns < width)[None, :]
        w = load_param(param, high, latents.to(tl.int64) * width, columns, mask)
        squares += w * w
    tl.store(norms + latents, tl.sqrt_rn(tl.sum(squares, 1)), mask=latents < F)


@triton.jit
def _fill_slots(slots, latents, F, A, BLOCK: tl.constexpr):
    # Two more places than latents: a row for no latent at all goes to the first, where the
    # kernels look for mistakes, and unused rows go to the second.
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(latents + row, mask=row < A, other=-1)
    latent = tl.where((latent < -1) | (latent > F), F, latent)
    tl.store(slots + tl.where(latent == -1, F + 1, latent), row, mask=row < A)


def tile_of(width: int, norm: str, slices: int) -> tuple[RowTile, int]:
    """The tile of a program and the number of columns it updates."""
    if norm == "none":
        tile = blocks(width)
        return tile, tile.columns
    return whole(width // slices), width // slices


def packed_parts(
    gradient: Gradient, param: torch.Tensor, high: torch.Tensor | None
) -> tuple[tuple[Any, ...], dict[str, int]]:
    """A gradient as the kernels take it, and the constants of its terms."""
    F, width = param.shape
    terms, constants = packed_terms(gradient.terms, width)
    row_coef, norms, split, dense, slots = None, None, None, None, None
    if gradient.row_coef is not None:
        # The parts of a matrix's rows are the rows of one that is as much longer.
        S = gradient.row_parts
        split, tile = (S, width // S) if S > 1 else None, blocks(width // S)
        row_coef = gradient.row_coef.contiguous()
        norms = torch.empty_like(row_coef)
        _row_norms[(-(-(F * S) // tile.latents),)](
            norms,
            param,
            high,
            F * S,
            width // S,
            LATENTS=tile.latents,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    if gradient.dense is not None and gradient.dense_latents is not None:
        dense, latents = gradient.dense.contiguous(), gradient.dense_latents.contiguous()
        slots = latents.new_full((F + 2,), -1)
        _fill_slots[(-(-latents.numel() // 256),)](slots, latents, F, latents.numel(), BLOCK=256)
    return (terms, row_coef, norms, split, dense, slots), constants


def run(
    matrix: AdamMatrix,
    gradient: Gradient,
    hyper: torch.Tensor,
    betas: Sequence[float],
    eps: float,
    norm: str,
    slices: int,
    lazy: bool,
) -> None:
    """Updates every row's columns in place."""
    (param, m, v, copy), (beta1, beta2) = matrix, betas
    F, width = param.shape
    parts, constants = packed_parts(gradient, param, copy)
    tile, part = tile_of(width, norm, slices)
    _row_update[(-(-F // tile.latents), -(-width // part))](
        param,
        m,
        v,
        copy,
        parts,
        hyper.contiguous(),
        (beta1, 1 - beta1, beta2, 1 - beta2, eps),
        F,
        width,
        part,
        NORM=norm,
        LAZY=lazy,
        **constants,
        **tile.constants(),
    )
    updated = [t for t in (param, m, v, copy) if t is not None]
    torch.autograd.graph.increment_version(updated)
