"""select_topk's product and what it lets through, in Triton.

A block multiplies a tile of tokens with a tile of latents and lets through entries that are not
below their row's threshold. Few are (k times the slab's growth per row), so what counts is that the
comparison is cheap and that waiting for a place in the lists is not done one entry at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_kernels import gpu
from sae_kernels.primitives.products import dot, product
from sae_kernels.primitives.select_topk.emission import (
    APPEND,
    APPEND_OPERANDS,
    TAKE_A_SLOT,
    TAKE_A_SLOT_OPERANDS,
)
from sae_kernels.primitives.select_topk.lists import bias, packed
from sae_kernels.primitives.select_topk.slabs import (
    Lists,
    Operands,
    Slab,
    Tile,
    describable,
    refuses,
    select,
)

__all__ = ["refuses", "run"]

# The largest tiles without spills. Accumulators take rows * columns / (32 * warps) registers of a
# thread's 255, on sm_100 only while entries are let through (in smaller chunks for that).
_TILES = {
    0: Tile(64, 256, 1024, 4, 1, 2),  # Triton's interpreter: few large operations
    90: Tile(128, 256, 128, 8, 3, 4),
    100: Tile(128, 256, 128, 8, 3, 8),
}
_POINTER_TILE = Tile(128, 128, 128, 8, 3, 2)  # addresses take registers
_FP32_TILE = Tile(64, 64, 128, 8, 3, 1)  # no matrix unit multiplies fp32 without rounding it
_GROUP = 8  # tiles of rows that share the same latents while these are in cache
_EMISSION = "portable" if gpu.interpreted() else "ptx"


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with ``_encode_slab``, selects with what all GPU backends share."""
    return select(Operands(x, W, b, rank_scale), k, tile_for(x, W), encode_slab)


def _described(x: torch.Tensor, W: torch.Tensor) -> bool:
    # Without the tensor memory accelerator (sm_80) descriptors are slower than pointers.
    return _family() in _TILES and describable(x, W)


def _family() -> int:
    return gpu.architecture() // 10 * 10  # what holds for sm_100 holds for sm_103


def tile_for(x: torch.Tensor, W: torch.Tensor) -> Tile:
    """The tile of these operands on this architecture."""
    if gpu.interpreted():
        return _TILES[0]
    if x.dtype == torch.float32:
        return _FP32_TILE
    return _TILES[_family()] if _described(x, W) else _POINTER_TILE


def encode_slab(operands: Operands, lists: Lists, slab: Slab, tile: Tile) -> None:
    """Scores a slab and lets through what is not below the thresholds."""
    x, W, b, rank_scale = operands
    (B, D), F = x.shape, W.shape[0]
    n_tiles = triton.cdiv(B, tile.rows) * (slab.stop - slab.start)
    matrices, constants = tiled(x, W, tile)
    _encode_slab[(min(n_tiles, gpu.multiprocessors(x.device)),)](
        *matrices,
        b,
        rank_scale,
        *lists,
        B,
        F,
        D,
        *slab,
        CAPACITY=lists.candidates.shape[1],
        CHUNKS=tile.chunks,
        EMISSION=_EMISSION,
        **constants,
    )


def tiled(x: torch.Tensor, W: torch.Tensor, tile: Tile) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Two packed matrices as a kernel of `scores` takes them, and what it is launched with."""
    depth, is_described = tile.depth // x.element_size(), _described(x, W)
    matrices: tuple[Any, Any] = (x, W)
    if is_described:
        rows = (tile.rows, tile.columns)
        matrices = tuple(
            TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [n, depth])
            for matrix, n in zip((x, W), rows, strict=True)
        )
    return matrices, {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": depth,
        "GROUP": _GROUP,
        "DESCRIBED": is_described,
        "WIDEN": gpu.interpreted(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit
def scores(
    x,
    W,
    row,
    column,
    B,
    F,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of the product; beyond the last token or latent it holds anything."""
    if DESCRIBED:
        h = tl.zeros((ROWS, COLUMNS), tl.float32)
        for part in range(0, D, DEPTH):
            h = dot(x.load([row, part]), W.load([column, part]).T, h, WIDEN)
        return h
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), B - 1)
        columns = tl.minimum(column + tl.arange(0, COLUMNS), F - 1)
        return product(x, W, rows, columns, D, DEPTH, WIDEN)


@triton.jit(do_not_specialize=["start", "stop", "stride"])
def _encode_slab(
    x,
    W,
    b,
    rank_scale,
    counts,
    thresholds,
    candidates,
    B,
    F,
    D,
    start,
    stop,
    stride,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    EMISSION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Persistent blocks over the slab's tiles, a group of row tiles after the other.

    Rows beyond the last token are multiplied like the others and write into the lists' padding;
    their threshold lets nothing through.
    """
    row_tiles = tl.cdiv(B, ROWS)
    column_tiles = tl.cdiv(F, COLUMNS).to(tl.int64)
    in_group = GROUP * (stop - start)
    for tile in tl.range(tl.program_id(0), row_tiles * (stop - start), tl.num_programs(0)):
        first = tile // in_group * GROUP
        size = tl.minimum(row_tiles - first, GROUP)
        row = (first + tile % in_group % size) * ROWS
        place = tile % in_group // size
        column = ((start + place) * stride % column_tiles).to(tl.int32) * COLUMNS
        rows = row + tl.arange(0, ROWS)
        h = scores(x, W, row, column, B, F, D, ROWS, COLUMNS, DEPTH, DESCRIBED, WIDEN)
        threshold = tl.load(thresholds + rows)
        threshold = tl.where(threshold == threshold, threshold, float("inf"))
        lists = candidates + rows.to(tl.int64) * CAPACITY
        by_latent = (b, rank_scale, F)
        _emit(h, column, by_latent, threshold, counts + rows, lists, CAPACITY, CHUNKS, EMISSION)


@triton.jit
def _emit(
    product,
    column,
    by_latent,
    threshold,
    counts,
    lists,
    CAPACITY: tl.constexpr,
    CHUNKS: tl.constexpr,
    EMISSION: tl.constexpr,
):
    """Appends the scores that are not below their row's threshold.

    Halved until the rest needs few registers besides the accumulators. "portable" is for Triton's
    interpreter, which knows no inline PTX; it differs in how places are handed out.
    """
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1] // (2 if CHUNKS > 1 else 1)
    if CHUNKS > 1:
        left, right = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        rest = (by_latent, threshold, counts, lists)
        _emit(left, column, *rest, CAPACITY, CHUNKS // 2, EMISSION)
        _emit(right, column + COLUMNS, *rest, CAPACITY, CHUNKS // 2, EMISSION)
    else:
        b, rank_scale, F = by_latent
        columns = column + tl.arange(0, COLUMNS)
        h = product + bias(b, columns, F)[None, :]
        key = h
        if rank_scale is not None:
            key = h * tl.load(rank_scale + columns, mask=columns < F, other=1.0)[None, :]
        if EMISSION == "ptx":
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
