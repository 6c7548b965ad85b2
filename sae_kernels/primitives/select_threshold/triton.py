"""select_threshold in Triton: blocks of the product list what passes; a second kernel orders it.

Where a token's entries go depends on how many all tokens before it have, which is known when every
tile is done. So a block lists the entries of its tiles row by row and in latent order, and notes
how many each row of a tile has and where these start. Sums over the counts are the entries' places,
and a second kernel takes them there.

The number of entries is what the host waits for. Most often the lists were long enough; if not, the
product is done again with lists as long as the longest had to be. Nothing is ever left out.

A block puts its tile into a part of memory of its own, small enough for all of them to stay in
cache, and reads it back by whole rows. Scanning rows where the matrix unit leaves them takes more
registers than there are; so it costs writing and reading 4 bytes a score in cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.candidate_lists import packed, unpacked
from sae_kernels.primitives.products import ProductTile, scores, tile_for, tiled
from sae_kernels.primitives.tensors import packed as in_order

_ROOM = 512  # entries a token on average, for which the lists have room at first
_MOST = 2**31 - 2**16  # places in all lists: they, and some beyond, are int32
# Scores that a block looks through at a time; runs put in order at a time, and entries of each:
# most have none or one. Triton's interpreter is slow by operation, whatever its size.
_SCANNED, _RUNS, _STEP = (1 << 14, 256, 256) if gpu.interpreted() else (4096, 256, 4)


@triton.jit
def _put_down(tile, at, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """Stores a tile, halved until its parts need few registers besides the accumulators."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1] // (2 if CHUNKS > 1 else 1)
    if CHUNKS > 1:
        left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        _put_down(left, at, WIDTH, CHUNKS // 2)
        _put_down(right, at + COLUMNS, WIDTH, CHUNKS // 2)
    else:
        tl.store(at + (tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :]), tile)


@triton.jit(do_not_specialize=["capacity"])
def _find(
    x,
    W,
    b,
    bounds,
    scratch,
    counts,
    starts,
    entries,
    found,
    capacity,
    B,
    F,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SCANNED: tl.constexpr,
    CHUNKS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Lists the entries of all tiles; blocks are persistent and go through groups of row tiles."""
    row_tiles, column_tiles = tl.cdiv(B, ROWS), tl.cdiv(F, COLUMNS)
    in_group = GROUP * column_tiles
    within = tl.arange(0, COLUMNS)
    own = scratch + tl.program_id(0).to(tl.int64) * ROWS * COLUMNS
    begin, done = tl.program_id(0) * capacity, tl.program_id(0).to(tl.int64) * 0
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        first = tile // in_group * GROUP
        size = tl.minimum(row_tiles - first, GROUP)
        row = (first + tile % in_group % size) * ROWS
        nth = tile % in_group // size
        column = nth * COLUMNS
        product = scores(x, W, row, column, B, F, D, ROWS, COLUMNS, DEPTH, DESCRIBED, WIDEN)
        tl.debug_barrier()  # of the tile before, other threads may still be reading
        _put_down(product, own, COLUMNS, CHUNKS)
        tl.debug_barrier()
        columns = column + within
        bias = 0.0 if b is None else tl.load(b + columns, mask=columns < F, other=0.0)[None, :]
        bound = tl.load(bounds + columns, mask=columns < F, other=0.0)[None, :]
        for part in range(0, ROWS, SCANNED):
            scanned = part + tl.arange(0, SCANNED)
            rows, live = row + scanned, row + scanned < B
            h = tl.load(own + (scanned[:, None] * COLUMNS + within[None, :])) + bias
            kept = (~(h <= bound) & live[:, None] & (columns < F)[None, :]).to(tl.int32)
            count = tl.sum(kept, 1)
            # Beyond the capacity nothing is stored, and it does not matter how far beyond.
            start = begin + tl.minimum(done, capacity).to(tl.int32) + tl.cumsum(count, 0) - count
            done += tl.sum(count, 0)
            at = rows.to(tl.int64) * column_tiles + nth
            tl.store(counts + at, count, mask=live)
            tl.store(starts + at, start, mask=live)
            place = start[:, None] + tl.cumsum(kept, 1) - 1
            entry = packed(tl.where(h == 0, 0.0, h), columns[None, :])
            tl.store(entries + place, entry, mask=(kept > 0) & (place < begin + capacity))
    tl.store(found + tl.program_id(0), done)


@triton.jit
def _put_in_order(
    counts, starts, ends, entries, values, indices, n_runs, RUNS: tl.constexpr, STEP: tl.constexpr
):
    """Moves runs, the entries of a token in a tile, from the lists to their places."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    count = tl.load(counts + run, mask=run < n_runs, other=0)[:, None]
    start = tl.load(starts + run, mask=run < n_runs, other=0)[:, None]
    place = tl.load(ends + run, mask=run < n_runs, other=0)[:, None] - count
    for done in range(0, tl.max(tl.max(count, 0), 0), STEP):
        nth = done + tl.arange(0, STEP)[None, :]
        h, latents = unpacked(tl.load(entries + (start + nth), mask=nth < count, other=0))
        tl.store(values + (place + nth), h, mask=nth < count)
        tl.store(indices + (place + nth), latents, mask=nth < count)


def run(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds all entries, waits for their number and puts them in order."""
    B, F = x.shape[0], W.shape[0]
    offsets = x.new_zeros(B + 1, dtype=torch.int32)
    if B == 0 or F == 0:
        return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int32), offsets
    operands = (x.contiguous(), W.contiguous(), in_order(b))
    tile = _tile(*operands[:2])
    n_tiles = triton.cdiv(F, tile.columns)
    counts, starts = (x.new_empty(B * n_tiles, dtype=torch.int32) for _ in range(2))
    runs, room = (counts, starts), min(B, 1 << 21) * _ROOM
    entries, found = _find_all(operands, bounds.contiguous(), runs, tile, room)
    if max(found) * len(found) > entries.numel():
        room = max(found) * len(found)
        entries, found = _find_all(operands, bounds.contiguous(), runs, tile, room)
    n = sum(found)
    ends = counts.cumsum(0, dtype=torch.int32)
    values = x.new_empty(n, dtype=torch.float32)
    indices = x.new_empty(n, dtype=torch.int32)
    _put_in_order[(triton.cdiv(B * n_tiles, _RUNS),)](
        *runs, ends, entries, values, indices, B * n_tiles, RUNS=_RUNS, STEP=_STEP, num_warps=4
    )
    offsets[1:] = ends[n_tiles - 1 :: n_tiles]
    return values, indices, offsets


def _tile(x: torch.Tensor, W: torch.Tensor) -> ProductTile:
    tile = tile_for(x, W)
    # Without matrix units the operands take registers that looking through a tile needs too.
    return tile._replace(depth=tile.depth // 2) if x.dtype == torch.float32 else tile


def _find_all(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    bounds: torch.Tensor,
    runs: tuple[torch.Tensor, torch.Tensor],
    tile: ProductTile,
    room: int,
) -> tuple[torch.Tensor, list[int]]:
    """The lists, in one tensor and as far as there is room, and the number of entries of each."""
    x, W, b = operands
    n_tiles = triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(W.shape[0], tile.columns)
    blocks = min(n_tiles, gpu.multiprocessors(x.device))
    capacity = triton.cdiv(room, blocks)
    if capacity * blocks > _MOST:
        raise ValueError(f"bounds: expected fewer scores above them than {room}; take fewer tokens")
    scratch = x.new_empty((blocks, tile.rows, tile.columns), dtype=torch.float32)
    entries = x.new_empty(blocks * capacity, dtype=torch.int64)
    found = x.new_zeros(blocks, dtype=torch.int64)
    matrices, constants = tiled(x, W, tile)
    _find[(blocks,)](
        *matrices,
        b,
        bounds,
        scratch,
        *runs,
        entries,
        found,
        capacity,
        x.shape[0],
        *W.shape,
        SCANNED=min(_SCANNED // tile.columns, tile.rows),
        CHUNKS=tile.chunks,
        **constants,
    )
    counted: list[int] = found.tolist()
    return entries, counted
