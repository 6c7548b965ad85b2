"""select_topk in Triton: a product that appends the scores that can still win to lists.

A block multiplies a tile of tokens with a tile of latents and lets through entries that are not
below their row's threshold. Few are (k times the pass's growth per row), so what counts is that the
comparison is cheap and that waiting for a place in the lists is not done one entry at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.candidate_lists import (
    ROWS_A_FLAG,
    CandidateLists,
    bias,
    first_of,
    packed,
)
from sae_kernels.primitives.few_tokens import note as few_note
from sae_kernels.primitives.few_tokens import tile_of_few
from sae_kernels.primitives.products import ProductTile, scores, tile_for, tiled
from sae_kernels.primitives.select_topk import few_tokens
from sae_kernels.primitives.select_topk.append_ptx import (
    APPEND,
    APPEND_OPERANDS,
    TAKE_A_SLOT,
    TAKE_A_SLOT_OPERANDS,
)
from sae_kernels.primitives.select_topk.column_passes import (
    ColumnPass,
    EncoderOperands,
    refuses,
    select,
)
from sae_kernels.primitives.select_topk.screen import (
    LATENTS_PER_KEPT,
    UNSCORED,
    bounded,
    pays,
    score_unscored,
    screen_of,
)
from sae_kernels.primitives.select_topk.screen import note as screen_note

if TYPE_CHECKING:
    import torch

__all__ = ["encode_pass", "refuses", "run", "tile_for"]

_APPENDED_BY = "portable" if gpu.interpreted() else "ptx"


def note(dtype: torch.dtype) -> str | None:
    """What `explain` adds about calls of this dtype."""
    where = f"where at most one of {LATENTS_PER_KEPT} latents is kept"
    return few_note(screen_note(dtype, where))


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    narrow: torch.Tensor | None = None,
    by_magnitude: bool = False,
    floor: torch.Tensor | None = None,
    screened: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects a few tokens' in two launches, others in passes scored by ``_encode_pass``."""
    tile = tile_of_few(*x.shape, W.shape[0], k) if screened is None else None
    if tile is not None:
        return few_tokens.select(x, W, b, rank_scale, k, tile, by_magnitude)
    given = (x.contiguous(), W.contiguous(), b, rank_scale)
    return selected(EncoderOperands(*given, by_magnitude=by_magnitude), k, screened)


def selected(
    operands: EncoderOperands, k: int, screened: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects for packed operands, in fp32 behind a screen in bf16.

    Whether there is one makes no difference to the result; None takes it where it is worth it.
    """
    multiplied = operands[:2]
    if operands.by_magnitude:
        screened = False
    if pays(operands.x, k, operands.n_latents) if screened is None else screened:
        operands = operands._replace(screen=screen_of(*multiplied))
    if operands.screen is not None:
        multiplied = (operands.screen.x.rows, operands.screen.W.rows)
    return select(operands, k, tile_for(*multiplied), encode_pass)


def encode_pass(
    operands: EncoderOperands, lists: CandidateLists, columns: ColumnPass, tile: ProductTile
) -> None:
    """Scores some columns and appends what is not below the thresholds to the lists."""
    x, W, b, rank_scale, listed, screen, by_magnitude = operands
    B, F = x.shape[0], W.shape[0]
    n_tiles = -(-B // tile.rows) * (columns.stop - columns.start)
    multiplied, lengths = (x, W), None
    if screen is not None:
        multiplied, lengths = (screen.x.rows, screen.W.rows), (screen.x.known, screen.W.known)
    matrices, constants = tiled(*multiplied, tile)
    _encode_pass[(min(n_tiles, gpu.multiprocessors(x.device)),)](
        *matrices,
        b,
        rank_scale,
        lengths,
        *lists,
        listed.firsts,
        operands.n_latents,
        B,
        F,
        multiplied[0].shape[1],
        *columns,
        CAPACITY=lists.candidates.shape[1],
        CHUNKS=tile.chunks,
        APPENDED_BY=_APPENDED_BY,
        BY_MAGNITUDE=by_magnitude,
        **constants,
    )
    if screen is not None:
        score_unscored(x, W, b, lists)


@triton.jit(do_not_specialize=["start", "stop", "stride"])
def _encode_pass(
    x,
    W,
    b,
    rank_scale,
    lengths,
    counts,
    thresholds,
    candidates,
    firsts,
    n_latents,
    B,
    F,
    D,
    pending,
    start,
    stop,
    stride,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    APPENDED_BY: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Scores the tiles of a pass; blocks are persistent and go through groups of row tiles.

    Rows beyond the last token are multiplied like the others and write into the lists' padding;
    their threshold lets nothing through.
    """
    n_tiles = tl.cdiv(B, ROWS) * (stop - start)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row, column = tile_at(tile, B, n_latents, (start, stop, stride), ROWS, COLUMNS, GROUP)
        if tl.load(pending + row // ROWS_A_FLAG) != 0:
            rows = row + tl.arange(0, ROWS)
            first = first_of(row, firsts)
            column += first
            h = scores(x, W, row, column, B, F, D, ROWS, COLUMNS, DEPTH, DESCRIBED, WIDEN)
            threshold = tl.load(thresholds + rows)
            threshold = tl.where(threshold == threshold, threshold, float("inf"))
            lists = candidates + rows.to(tl.int64) * CAPACITY
            by_latent, by_row = (b, rank_scale, first + n_latents), (lengths, rows, B)
            into = (by_latent, by_row, threshold, counts + rows, lists)
            _append_passing(h, column, *into, CAPACITY, CHUNKS, APPENDED_BY, BY_MAGNITUDE)


@triton.jit
def tile_at(tile, B, F, visit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of a tile of the pass."""
    start, stop, stride = visit
    in_group = GROUP * (stop - start)
    first = tile // in_group * GROUP
    size = tl.minimum(tl.cdiv(B, ROWS) - first, GROUP)
    place = tile % in_group // size
    column_tile = (start + place).to(tl.int64) * stride % tl.cdiv(F, COLUMNS)
    return (first + tile % in_group % size) * ROWS, column_tile.to(tl.int32) * COLUMNS


@triton.jit
def _append_passing(
    product,
    column,
    by_latent,
    by_row,
    threshold,
    counts,
    lists,
    CAPACITY: tl.constexpr,
    CHUNKS: tl.constexpr,
    APPENDED_BY: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
):
    """Appends the scores that are not below their row's threshold.

    Halved until the rest needs few registers besides the accumulators. "portable" is for Triton's
    interpreter, which knows no inline PTX; it differs in how places are handed out.
    """
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1] // (2 if CHUNKS > 1 else 1)
    if CHUNKS > 1:
        left, right = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        rest = (by_latent, by_row, threshold, counts, lists)
        half: tl.constexpr = CHUNKS // 2
        _append_passing(left, column, *rest, CAPACITY, half, APPENDED_BY, BY_MAGNITUDE)
        _append_passing(right, column + COLUMNS, *rest, CAPACITY, half, APPENDED_BY, BY_MAGNITUDE)
    else:
        b, rank_scale, end = by_latent
        lengths, rows, B = by_row
        columns = column + tl.arange(0, COLUMNS)
        offset = bias(b, columns, end)[None, :]
        scale = 1.0
        if rank_scale is not None:
            scale = tl.load(rank_scale + columns, mask=columns < end, other=1.0)[None, :]
        if lengths is not None:
            product = bounded(product, lengths, rows, B, columns, end, scale)
            columns |= UNSCORED
        h = product + offset
        key = h
        if rank_scale is not None:
            key = h * scale
        if BY_MAGNITUDE:  # that of the -inf which keeps other latents out would win
            key = tl.where(columns[None, :] < end, tl.abs(key), float("-inf"))
        if APPENDED_BY == "ptx":
            _append(h, key, columns, threshold, counts, lists, CAPACITY)
        else:
            passes = ~(key < threshold[:, None])
            n = tl.sum(passes.to(tl.int32), 1)
            end = tl.atomic_add(counts, n, mask=n > 0, sem="relaxed")
            slots = end[:, None] + tl.cumsum(passes.to(tl.int32), 1) - 1
            fits = passes & (slots < CAPACITY)
            tl.store(lists[:, None] + slots, packed(h, columns[None, :]), mask=fits)


@triton.jit
def _append(h, key, columns, threshold, counts, lists, CAPACITY: tl.constexpr):
    slots = tl.inline_asm_elementwise(
        TAKE_A_SLOT,
        TAKE_A_SLOT_OPERANDS,
        [key, threshold[:, None], counts.to(tl.int64)[:, None]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.inline_asm_elementwise(
        APPEND,
        APPEND_OPERANDS,
        [slots, lists.to(tl.int64)[:, None], h, columns[None, :], CAPACITY],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
