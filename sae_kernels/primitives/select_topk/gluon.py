"""select_topk in Gluon for Hopper: some warps only load, the others multiply and append.

One warp keeps the tensor memory accelerator busy, also across tiles. Two groups of four warps take
a half of each tile's rows each. They share the stages that it fills, but neither waits for the
other otherwise, and the second begins later: while one compares and appends, the other multiplies
as far as stages are full. A group alone can keep the matrix units busy, and as the tile is shared
nothing is loaded twice, which a tile for each would cost. What is let through is what
``triton.py`` lets through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sae_kernels import gpu
from sae_kernels.primitives.candidate_lists import ROWS_A_FLAG
from sae_kernels.primitives.products import ProductTile, describable
from sae_kernels.primitives.select_topk import column_passes
from sae_kernels.primitives.select_topk.append_ptx import (
    APPEND,
    APPEND_OPERANDS,
    TAKE_A_SLOT,
    TAKE_A_SLOT_OPERANDS,
)
from sae_kernels.primitives.select_topk.column_passes import ColumnPass, EncoderOperands

if TYPE_CHECKING:
    from sae_kernels.primitives.candidate_lists import CandidateLists

# 4 stages of 48 KiB; the accumulators take 128 of a thread's registers. The warps are two groups.
_TILE = ProductTile(rows=128, columns=256, depth=128, warps=8, stages=4, chunks=4)
_GROUP = 8  # tiles of rows that share the same latents while these are in cache
# What is left for the other group is as much again.
_MULTIPLIER_REGISTERS, _LOADER_REGISTERS = 232, 40


def refuses(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
    narrow: torch.Tensor | None = None,
    by_magnitude: bool = False,
    floor: torch.Tensor | None = None,
) -> str | None:
    """Why this kernel cannot select, or None."""
    if by_magnitude:
        return "it ranks by the score, not by its magnitude"
    if not describable(x, W):
        return (
            f"its loads take rows of whole 16 bytes at aligned addresses, got x "
            f"{list(x.shape)} and W {list(W.shape)} in {x.dtype}"
        )
    return column_passes.refuses(x, W, b, k)


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    narrow: torch.Tensor | None = None,
    by_magnitude: bool = False,
    floor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects in passes over the columns, each scored by ``_encode_pass``."""
    operands = EncoderOperands(x, W, b, rank_scale)
    return column_passes.select(operands, k, tile_for(x, W), encode_pass)


def tile_for(x: torch.Tensor, W: torch.Tensor) -> ProductTile:
    """The tile of these operands: the same for all."""
    return _TILE


def encode_pass(
    operands: EncoderOperands, lists: CandidateLists, columns: ColumnPass, tile: ProductTile
) -> None:
    """Scores some columns and appends what is not below the thresholds to the lists."""
    x, W, b, rank_scale, *_ = operands
    (B, D), F = x.shape, W.shape[0]
    n_tiles = -(-B // tile.rows) * (columns.stop - columns.start)
    _encode_pass[(min(n_tiles, gpu.multiprocessors(x.device)),)](
        _described(x, tile.rows, tile),
        _described(W, tile.columns, tile),
        b,
        rank_scale,
        *lists,
        B,
        F,
        D,
        *columns,
        CAPACITY=lists.candidates.shape[1],
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth // x.element_size(),
        GROUP=_GROUP,
        STAGES=tile.stages,
        CHUNKS=tile.chunks,
        MULTIPLIER_REGISTERS=_MULTIPLIER_REGISTERS,
        LOADER_REGISTERS=_LOADER_REGISTERS,
        num_warps=tile.warps // 2,
    )


def _described(matrix: torch.Tensor, rows: int, tile: ProductTile) -> TensorDescriptor:
    block = [rows, tile.depth // matrix.element_size()]
    dtype = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], block, layout)


@gluon.jit
def _tile_at(tile, B, F, visit, ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
    """The first row and column of a tile of the pass."""
    start, stop, stride = visit
    row_tiles = gl.cdiv(B, ROWS)
    in_group = GROUP * (stop - start)
    first = tile // in_group * GROUP
    size = gl.minimum(row_tiles - first, GROUP)
    place = tile % in_group // size
    column_tile = (start + place).to(gl.int64) * stride % gl.cdiv(F, COLUMNS)
    return (first + tile % in_group % size) * ROWS, column_tile.to(gl.int32) * COLUMNS


@gluon.jit
def _load(x, W, ring, pending, sizes, visit, GROUP: gl.constexpr):
    """Fills stages as they become empty, for all tiles of the block that are scored."""
    tokens, latents, empty, full = ring
    B, F, D = sizes
    ROWS: gl.constexpr = tokens.shape[1]
    COLUMNS: gl.constexpr = latents.shape[1]
    DEPTH: gl.constexpr = tokens.shape[2]
    STAGES: gl.constexpr = tokens.shape[0]
    n_tiles = gl.cdiv(B, ROWS) * (visit[1] - visit[0])
    step = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, column = _tile_at(tile, B, F, visit, ROWS, COLUMNS, GROUP)
        if gl.load(pending + row // ROWS_A_FLAG) != 0:
            for part in range(0, D, DEPTH):
                stage = step % STAGES
                # Barriers start with the phase before the first complete: all stages are empty.
                mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
                mbarrier.expect(full.index(stage), x.block_type.nbytes + W.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    x, [row, part], full.index(stage), tokens.index(stage)
                )
                tma.async_copy_global_to_shared(
                    W, [column, part], full.index(stage), latents.index(stage)
                )
                step += 1


@gluon.jit
def _multiply(
    ring,
    by_latent,
    rows_held,
    pending,
    sizes,
    visit,
    CAPACITY: gl.constexpr,
    GROUP: gl.constexpr,
    CHUNKS: gl.constexpr,
    SECOND: gl.constexpr,
):
    """Multiplies stages as they become full and appends what is not below the thresholds.

    SECOND: whether it is the group that takes the lower half of the rows, and begins later.
    """
    tokens, latents, empty, full = ring
    B, F, D = sizes
    ROWS: gl.constexpr = tokens.shape[1]
    COLUMNS: gl.constexpr = latents.shape[1]
    DEPTH: gl.constexpr = tokens.shape[2]
    STAGES: gl.constexpr = tokens.shape[0]
    OWN_ROWS: gl.constexpr = ROWS // 2
    FIRST: gl.constexpr = OWN_ROWS if SECOND else 0
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, COLUMNS, 16]
    )
    n_tiles = gl.cdiv(B, ROWS) * (visit[1] - visit[0])
    step = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, column = _tile_at(tile, B, F, visit, ROWS, COLUMNS, GROUP)
        if gl.load(pending + row // ROWS_A_FLAG) != 0:
            if SECOND:
                # Of fewer parts the stage might stay empty.
                begins = (step == 0) & (D > (STAGES - 1) * DEPTH)
                mbarrier.wait(full.index(STAGES - 1), 0, pred=begins)
            h = gl.zeros((OWN_ROWS, COLUMNS), gl.float32, LAYOUT)
            for part in range(0, D, DEPTH):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), step // STAGES & 1)
                own = tokens.index(stage).slice(FIRST, OWN_ROWS)
                h = warpgroup_mma(own, latents.index(stage).permute((1, 0)), h, is_async=True)
                # One product stays under way; what the one before read may be overwritten.
                h = warpgroup_mma_wait(num_outstanding=1, deps=(h,))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=part > 0)
                step += 1
            h = warpgroup_mma_wait(num_outstanding=0, deps=(h,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
            _append_passing(h, row + FIRST, column, by_latent, rows_held, F, CAPACITY, CHUNKS)


@gluon.jit
def _append_passing(
    product,
    row,
    column,
    by_latent,
    rows_held,
    F,
    CAPACITY: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    ROWS: gl.constexpr = product.shape[0]
    COLUMNS: gl.constexpr = product.shape[1] // (2 if CHUNKS > 1 else 1)
    if CHUNKS > 1:
        left, right = product.reshape((ROWS, 2, COLUMNS)).permute((0, 2, 1)).split()
        rest = (by_latent, rows_held, F)
        _append_passing(left, row, column, *rest, CAPACITY, CHUNKS // 2)
        _append_passing(right, row, column + COLUMNS, *rest, CAPACITY, CHUNKS // 2)
    else:
        b, rank_scale = by_latent
        counts, thresholds, candidates = rows_held
        LAYOUT: gl.constexpr = product.type.layout
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
        live = columns < F
        if b is None:
            bias = gl.where(live, 0.0, float("-inf"))
        else:
            bias = gl.load(b + columns, mask=live, other=float("-inf"))
        h = product + bias[None, :]
        lists = candidates + rows.to(gl.int64) * CAPACITY
        key = h
        if rank_scale is not None:
            key = h * gl.load(rank_scale + columns, mask=live, other=1.0)[None, :]
        threshold = gl.load(thresholds + rows)
        threshold = gl.where(threshold == threshold, threshold, float("inf"))
        _append(h, key, columns, threshold, counts + rows, lists, CAPACITY)


@gluon.jit
def _append(h, key, columns, threshold, counts, lists, CAPACITY: gl.constexpr):
    slots = gl.inline_asm_elementwise(
        TAKE_A_SLOT,
        TAKE_A_SLOT_OPERANDS,
        [key, threshold[:, None], counts.to(gl.int64)[:, None]],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    gl.inline_asm_elementwise(
        APPEND,
        APPEND_OPERANDS,
        [slots, lists.to(gl.int64)[:, None], h, columns[None, :], CAPACITY],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit(do_not_specialize=["start", "stop", "stride"])
def _encode_pass(
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
    pending,
    start,
    stop,
    stride,
    CAPACITY: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    DEPTH: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,
    MULTIPLIER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Runs a loader and two groups of multipliers with a ring of stages between them."""
    tokens = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, DEPTH], x.layout)
    latents = gl.allocate_shared_memory(W.dtype, [STAGES, COLUMNS, DEPTH], W.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=2)  # both groups are done with it
        mbarrier.init(full.index(stage), count=1)
    visit, sizes = (start, stop, stride), (B, F, D)
    by_latent = (b, rank_scale)
    rows_held = (counts, thresholds, candidates)
    ring = (tokens, latents, empty, full)
    gl.warp_specialize(
        [
            (
                _multiply,
                (ring, by_latent, rows_held, pending, sizes, visit, CAPACITY, GROUP, CHUNKS, False),
            ),
            (
                _multiply,
                (ring, by_latent, rows_held, pending, sizes, visit, CAPACITY, GROUP, CHUNKS, True),
            ),
            (_load, (x, W, ring, pending, sizes, visit, GROUP)),
        ],
        [gl.num_warps(), 1],
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )
