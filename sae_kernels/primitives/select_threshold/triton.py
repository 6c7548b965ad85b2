"""select_threshold in Triton: blocks of the product list what passes; a second kernel orders it.

Where a token's entries go depends on how many all tokens before it have, which is known when every
tile is done. So a block lists the entries of its tiles row by row, those of a row in any order, and
notes how many each row of a tile has and where these end. Sums over the counts are the entries'
places, and a second kernel takes them there in latent order.

The number of entries is what the host waits for. Most often the lists were long enough; if not, the
product is done again with lists as long as the longest had to be. Nothing is ever left out.

A block looks through the scores twice, both times in the registers where the matrix unit leaves
them: it counts what passes, and when it knows where each row's entries begin it stores them.

In fp32 a product in bf16 lists what may be above its bound (``select_topk/screen.py``), and what is
there is scored in fp32 and compared once more. Where too much may be, blocks stop early and the
fp32 product does it all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.candidate_lists import packed, unpacked
from sae_kernels.primitives.few_tokens import note as few_note
from sae_kernels.primitives.few_tokens import tile_of_few
from sae_kernels.primitives.products import ProductTile, scores, tile_for, tiled
from sae_kernels.primitives.select_threshold import few_tokens
from sae_kernels.primitives.select_topk.append_ptx import (
    APPEND,
    APPEND_OPERANDS,
    TAKE_A_SLOT_ABOVE,
    TAKE_A_SLOT_OPERANDS,
)
from sae_kernels.primitives.select_topk.screen import (
    Screen,
    bounded,
    pays,
    score_found,
    screen_of,
)
from sae_kernels.primitives.select_topk.screen import note as screen_note
from sae_kernels.primitives.tensors import Ragged, kept_entries
from sae_kernels.primitives.tensors import packed as in_order

_ROOM = 512  # entries a token on average, for which the lists have room at first
# Latents for each entry that passes a screen: an entry takes as long as some 30 of the fp32
# product, for a row of W is read for it alone.
_LATENTS_PER_ENTRY = 32
_NOWHERE = tl.constexpr(2**31 - 2**15)  # a place beyond all lists
_NONE = tl.constexpr((2**31 - 1) << 32)  # an entry of a latent after all
_MOST = 2**31 - 2**16  # places in all lists: they, and some beyond, are int32
# Runs put in order at a time, and entries of each: most have none or one. Triton's interpreter is
# slow by operation, whatever its size, and knows no inline PTX.
_RUNS, _STEP, _APPENDED_BY = (256, 32, "portable") if gpu.interpreted() else (256, 4, "ptx")


@triton.jit
def _append_passing(
    product,
    column,
    by_latent,
    by_row,
    cursors,
    entries,
    end,
    F,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    APPENDED_BY: tl.constexpr,
):
    """Counts up each row's cursor by what passes; with entries, stores these where it was.

    Halved until the rest needs few registers besides the scores.
    """
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1] // (2 if CHUNKS > 1 else 1)
    if CHUNKS > 1:
        left, right = tl.split(tl.permute(tl.reshape(product, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        rest = (by_latent, by_row, cursors, entries, end, F)
        _append_passing(left, column, *rest, CHUNKS // 2, WHOLE, APPENDED_BY)
        _append_passing(right, column + COLUMNS, *rest, CHUNKS // 2, WHOLE, APPENDED_BY)
    else:
        b, bounds = by_latent
        columns = column + tl.arange(0, COLUMNS)
        live = columns < F
        if by_row[0] is not None:
            product = bounded(product, *by_row, columns, F, 1.0)
        bias = 0.0 if b is None else tl.load(b + columns, mask=live, other=0.0)[None, :]
        h = product + (bias + 0.0)  # -0 becomes +0
        if not WHOLE:
            h = tl.where(live[None, :], h, float("-inf"))
        bound = tl.load(bounds + columns, mask=live, other=float("inf"))[None, :]
        if APPENDED_BY == "ptx":
            slots = tl.inline_asm_elementwise(
                TAKE_A_SLOT_ABOVE,
                TAKE_A_SLOT_OPERANDS,
                [h, bound, cursors.to(tl.int64)[:, None]],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
            if entries is not None:
                tl.inline_asm_elementwise(
                    APPEND,
                    APPEND_OPERANDS,
                    [slots, entries.to(tl.int64), h, columns[None, :], end],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
        else:
            passes = ~(h <= bound)
            n = tl.sum(passes.to(tl.int32), 1)
            before = tl.atomic_add(cursors, n, sem="relaxed")
            if entries is not None:
                slots = before[:, None] + tl.cumsum(passes.to(tl.int32), 1) - 1
                tl.store(entries + slots, packed(h, columns[None, :]), mask=passes & (slots < end))


@triton.jit(do_not_specialize=["capacity"])
def _find(
    x,
    W,
    b,
    bounds,
    lengths,
    counts,
    ends,
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
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    APPENDED_BY: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Lists the entries of all tiles; blocks are persistent and go through groups of row tiles."""
    row_tiles, column_tiles = tl.cdiv(B, ROWS), tl.cdiv(F, COLUMNS)
    in_group = GROUP * column_tiles
    begin, done = tl.program_id(0) * capacity, tl.program_id(0).to(tl.int64) * 0
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        first = tile // in_group * GROUP
        size = tl.minimum(row_tiles - first, GROUP)
        row = (first + tile % in_group % size) * ROWS
        nth = tile % in_group // size
        column = nth * COLUMNS
        rows = row + tl.arange(0, ROWS)
        # Rows beyond the last token have counts too.
        at = rows.to(tl.int64) * column_tiles + nth
        # How much passes a screen beyond its list nobody needs to know.
        if lengths is None or done <= capacity:
            tl.store(counts + at, 0)
            product = scores(x, W, row, column, B, F, D, ROWS, COLUMNS, DEPTH, DESCRIBED, WIDEN)
            by, sizes = ((b, bounds), (lengths, rows, B)), (begin + capacity, F)
            tl.debug_barrier()
            _append_passing(
                product, column, *by, counts + at, None, *sizes, CHUNKS, WHOLE, APPENDED_BY
            )
            tl.debug_barrier()
            # An atomic, for what a load would find in a cache may be old.
            count = tl.where(rows < B, tl.atomic_add(counts + at, 0, sem="relaxed"), 0)
            # Beyond the capacity nothing is stored, and it does not matter how far beyond.
            start = begin + tl.minimum(done, capacity).to(tl.int32) + tl.cumsum(count, 0) - count
            done += tl.sum(count, 0)
            tl.store(ends + at, tl.where(rows < B, start, _NOWHERE))
            tl.debug_barrier()
            _append_passing(
                product, column, *by, ends + at, entries, *sizes, CHUNKS, WHOLE, APPENDED_BY
            )
    tl.store(found + tl.program_id(0), done)


@triton.jit
def _put_in_order(
    counts,
    ends,
    places,
    entries,
    values,
    indices,
    n_runs,
    RUNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Moves runs, the entries of a token in a tile, from the lists to their places."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    count = tl.load(counts + run, mask=run < n_runs, other=0)[:, None]
    start = tl.load(ends + run, mask=run < n_runs, other=0)[:, None] - count
    place = tl.load(places + run, mask=run < n_runs, other=0)[:, None] - count
    longest = tl.max(tl.max(count, 0), 0)
    for done in range(0, longest, STEP):
        nth = done + tl.arange(0, STEP)[None, :]
        h, latents = unpacked(tl.load(entries + (start + nth), mask=nth < count, other=0))
        before = tl.zeros(latents.shape, tl.int32)
        for some in range(0, longest, STEP):
            of_run = some + tl.arange(0, STEP)[None, :]
            others = tl.load(entries + (start + of_run), mask=of_run < count, other=_NONE)
            _, other = unpacked(others)
            before += tl.sum((other[:, None, :] < latents[:, :, None]).to(tl.int32), 2)
        tl.store(values + (place + before), h, mask=nth < count)
        tl.store(indices + (place + before), latents, mask=nth < count)


def note(dtype: torch.dtype) -> str | None:
    """What `explain` adds about calls of this dtype."""
    few = f"where at most {_ROOM} scores of a token and one of {_LATENTS_PER_ENTRY} pass"
    return few_note(screen_note(dtype, few))


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    bounds: torch.Tensor,
    narrow: torch.Tensor | None = None,
    screened: bool | None = None,
) -> Ragged:
    """Finds all entries, waits for their number and puts them in order, in fp32 behind a screen.

    Whether there is one makes no difference to the result; None takes it where it is worth it.
    """
    B, F = x.shape[0], W.shape[0]
    if B == 0 or F == 0:
        offsets = x.new_zeros(B + 1, dtype=torch.int32)
        return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int32), offsets
    x, W, b, bounds = x.contiguous(), W.contiguous(), in_order(b), bounds.contiguous()
    few = tile_of_few(*x.shape, F) if screened is None else None
    if few is not None:
        return few_tokens.select(x, W, b, bounds, few)
    found = None
    if pays(x, 0, F) if screened is None else screened:
        found = behind_screen(x, W, b, bounds)
    if found is None:
        found = _listed((x, W), b, bounds, None)
        assert found is not None  # lists that are too short are made longer
        return found
    score_found(x, W, b, found)
    values, indices, _ = found
    return kept_entries(found, ~(values <= bounds[indices.long()]))


def behind_screen(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, bounds: torch.Tensor
) -> Ragged | None:
    """What may be above its bound, with upper bounds for values; None where that is too much."""
    screen = screen_of(x, W)
    return None if screen is None else _listed((screen.x.rows, screen.W.rows), b, bounds, screen)


def _listed(
    multiplied: tuple[torch.Tensor, torch.Tensor],
    b: torch.Tensor | None,
    bounds: torch.Tensor,
    screen: Screen | None,
) -> Ragged | None:
    """The entries above their bounds; None where a screen let more through than it has room for."""
    x, W = multiplied
    B, F = x.shape[0], W.shape[0]
    tile = _tile(x, W, screen)
    n_tiles = -(-F // tile.columns)
    padded = -(-B // tile.rows) * tile.rows
    counts, ends = x.new_empty((2, padded * n_tiles), dtype=torch.int32)
    runs, room = (counts, ends), min(B, 1 << 21) * _ROOM
    lengths = None
    if screen is not None:
        room, lengths = min(room, B * F // _LATENTS_PER_ENTRY), (screen.x.known, screen.W.known)
    entries, found = _find_all(multiplied, (b, bounds, lengths), runs, tile, room)
    if max(found) * len(found) > entries.numel():
        if screen is not None:
            return None
        room = max(found) * len(found)
        entries, found = _find_all(multiplied, (b, bounds, lengths), runs, tile, room)
    n = sum(found)
    places = counts[: B * n_tiles].cumsum(0, dtype=torch.int32)
    values = x.new_empty(n, dtype=torch.float32)
    indices = x.new_empty(n, dtype=torch.int32)
    _put_in_order[(-(-(B * n_tiles) // _RUNS),)](
        *runs, places, entries, values, indices, B * n_tiles, RUNS=_RUNS, STEP=_STEP, num_warps=4
    )
    offsets = x.new_zeros(B + 1, dtype=torch.int32)
    offsets[1:] = places[n_tiles - 1 :: n_tiles]
    return values, indices, offsets


def _tile(x: torch.Tensor, W: torch.Tensor, screen: Screen | None) -> ProductTile:
    """The product's tile, changed where looking through it twice would spill registers."""
    tile = tile_for(x, W)
    if screen is not None:  # what bounds are computed from takes some, scales some more
        return tile._replace(chunks=tile.chunks * (2 if screen.x.scale is None else 4))
    # Without matrix units the operands do.
    return tile._replace(depth=tile.depth // 2) if x.dtype == torch.float32 else tile


def _find_all(
    multiplied: tuple[torch.Tensor, torch.Tensor],
    compared: tuple[object, ...],
    runs: tuple[torch.Tensor, torch.Tensor],
    tile: ProductTile,
    room: int,
) -> tuple[torch.Tensor, list[int]]:
    """The lists, in one tensor and as far as there is room, and the number of entries of each."""
    x, W = multiplied
    n_tiles = -(-x.shape[0] // tile.rows) * -(-W.shape[0] // tile.columns)
    blocks = min(n_tiles, gpu.multiprocessors(x.device))
    capacity = -(-room // blocks)
    if capacity * blocks > _MOST:
        raise ValueError(f"bounds: expected fewer scores above them than {room}; take fewer tokens")
    entries = x.new_empty(blocks * capacity, dtype=torch.int64)
    found = x.new_zeros(blocks, dtype=torch.int64)
    matrices, constants = tiled(x, W, tile)
    _find[(blocks,)](
        *matrices,
        *compared,
        *runs,
        entries,
        found,
        capacity,
        x.shape[0],
        *W.shape,
        CHUNKS=tile.chunks,
        WHOLE=W.shape[0] % tile.columns == 0,
        APPENDED_BY=_APPENDED_BY,
        **constants,
    )
    counted: list[int] = found.tolist()
    return entries, counted
