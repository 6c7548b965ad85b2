"""select_topk_routed in Triton: scores a part of every expert's latents after the other.

Tokens are taken in the order of their experts, as many at once as have lists that stay in cache. A
product writes the scores of a part of the latents straight into the lists, which are then cut back
to their k best; behind these comes the next part, until the expert has no more latents. An expert
is 1/E of the dictionary, so a threshold that lets only a few scores through, as without experts,
has less to save, and lists that take whatever comes cannot overflow.

Which tokens a block multiplies it finds out itself: the host knows only that rows / ROWS blocks,
rounded up, and one more for each expert are enough.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives import candidate_lists as lists
from sae_kernels.primitives import schedule
from sae_kernels.primitives.products import ProductTile, product
from sae_kernels.primitives.select_topk import triton as whole
from sae_kernels.primitives.tensors import packed

_MOST_EXPERTS = 512  # as many as route_top1 takes; every block looks through all of them
# Products by pointers, for rows are gathered. The small tile is for what takes more registers:
# fp32, which no matrix unit multiplies unrounded, and widths that are no multiple of 16.
_TILE, _SMALL_TILE = ProductTile(128, 128, 128, 8, 3, 1), ProductTile(64, 64, 128, 8, 3, 1)
_INTERPRETED = ProductTile(128, 512, 1024, 4, 1, 1)  # few large operations
# Entries of lists that a block of four warps holds without spilling registers, and lists of a block
# at most.
_ENTRIES = 1 << 16 if gpu.interpreted() else 1024
_MOST_LISTS = 128
_SHORTEST = 16


class RoutedOperands(NamedTuple):
    """The arguments of select_topk_routed, packed."""

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor | None
    tokens: torch.Tensor
    starts: torch.Tensor

    @property
    def n_experts(self) -> int:
        return self.starts.shape[0] - 1


class TokenLists(NamedTuple):
    """Lists of the k best of tokens and what is being added to them.

    Attributes:
        counts: int32 [rows].
        candidates: int64 [rows, capacity], entries as :mod:`candidate_lists` packs them.
    """

    counts: torch.Tensor
    candidates: torch.Tensor


class LatentPart(NamedTuple):
    """``n`` latents of each expert from its ``column``-th on; lists hold ``held`` before."""

    column: int
    n: int
    held: int


@triton.jit
def _tile_of(nth, starts, begin, end, E, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of the nth tile of the positions [begin, end), its first row and where it ends.

    An expert's rows are whole tiles and what is left. Beyond the last tile the expert is -1.
    """
    e = tl.arange(0, EXPERTS)
    first = tl.load(starts + e, mask=e < E, other=end)
    last = tl.load(starts + e + 1, mask=e < E, other=end)
    first = tl.minimum(tl.maximum(first, begin), end)
    last = tl.minimum(tl.maximum(last, first), end)
    tiles = tl.cdiv(last - first, ROWS)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= nth) & (nth < before + tiles)
    expert = tl.max(tl.where(mine, e, -1), 0)
    row = tl.sum(tl.where(mine, first + (nth - before) * ROWS, 0), 0)
    return expert, row, tl.sum(tl.where(mine, last, 0), 0)


@triton.jit(do_not_specialize=["begin", "end", "column", "n", "held"])
def _score(
    x,
    W,
    b,
    tokens,
    starts,
    counts,
    candidates,
    begin,
    end,
    column,
    n,
    held,
    B,
    F,
    D,
    E,
    CAPACITY: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Appends the scores of a tile to the lists."""
    expert, row, stop = _tile_of(tl.program_id(0), starts, begin, end, E, ROWS, EXPERTS)
    if expert < 0:
        return
    rows = row + tl.arange(0, ROWS)
    live = rows < stop
    token = tl.load(tokens + rows, mask=live, other=0)
    token = tl.minimum(tl.maximum(token, 0), B - 1)
    nth = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    latents = expert * (F // E) + column + tl.minimum(nth, n - 1)
    h = product(x, W, token, latents, D, DEPTH, WIDEN)
    if b is not None:
        h += tl.load(b + latents)[None, :]
    own = candidates + (rows - begin).to(tl.int64)[:, None] * CAPACITY + held
    entries = lists.packed(h, latents[None, :])
    tl.store(own + nth[None, :], entries, mask=live[:, None] & (nth < n)[None, :])
    tl.store(counts + (rows - begin), held + n, mask=live & (tl.program_id(1) == 0))


@triton.jit
def _keep(
    counts,
    candidates,
    n_rows,
    F,
    k,
    CAPACITY: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Cuts lists back to their k best."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n_rows
    n, _, _ = lists.keep(rows, live, counts, candidates, None, F, k, CAPACITY, LENGTH)
    tl.store(counts + rows, n, mask=live)


@triton.jit(do_not_specialize=["begin"])
def _write(
    candidates,
    tokens,
    values,
    indices,
    begin,
    n_rows,
    B,
    k,
    CAPACITY: tl.constexpr,
    BEST: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes the results of lists, in selection order, to the rows of their tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens + begin + rows, mask=rows < n_rows, other=-1)
    live = (token >= 0) & (token < B)
    # A list's row is not its token's: what `write_selected` adds for the one is taken off for the
    # other.
    moved = (token - rows).to(tl.int64)[:, None] * k
    results = (values + moved, indices + moved)
    lists.write_selected(rows, live, candidates, None, *results, k, CAPACITY, BEST, STEP)


def refuses(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    tokens: torch.Tensor,
    starts: torch.Tensor,
) -> str | None:
    """Why this call cannot run, or None."""
    if k > schedule.LARGEST_K:
        return f"its lists hold k <= {schedule.LARGEST_K}, got k = {k}"
    if starts.shape[0] - 1 > _MOST_EXPERTS:
        return f"it takes at most {_MOST_EXPERTS} experts, got {starts.shape[0] - 1}"
    return None


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    tokens: torch.Tensor,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects for as many tokens at once as have lists that stay in cache."""
    if starts.shape[0] == 2:
        return whole.run(x, W, b, k, None)
    routed = RoutedOperands(packed(x), packed(W), packed(b), packed(tokens), packed(starts))
    B = x.shape[0]
    values = x.new_empty((B, k), dtype=torch.float32)
    indices = x.new_empty((B, k), dtype=torch.int32)
    capacity = room(W.shape[0] // routed.n_experts)
    at_once = schedule.rows_at_once(capacity)
    padded = triton.cdiv(min(B, at_once), _MOST_LISTS) * _MOST_LISTS
    own = TokenLists(
        x.new_empty(padded, dtype=torch.int32),
        x.new_empty((padded, capacity), dtype=torch.int64),
    )
    for begin in range(0, B, at_once):
        _select(routed, k, own, (begin, min(B, begin + at_once)), (values, indices))
    return values, indices


def room(width: int) -> int:
    """Size of a list: all of an expert's latents, or as many as one block sorts."""
    return min(max(_SHORTEST, gpu.next_power_of_two(width)), schedule.MOST_CAPACITY)


def parts(width: int, k: int, capacity: int) -> list[LatentPart]:
    """Divides an expert's latents into parts that fit a list behind the k best so far."""
    found = [LatentPart(0, min(width, capacity), 0)]
    while (column := found[-1].column + found[-1].n) < width:
        found.append(LatentPart(column, min(width - column, capacity - k), k))
    return found


def _select(
    routed: RoutedOperands,
    k: int,
    own: TokenLists,
    positions: tuple[int, int],
    results: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Selects for the tokens at positions [begin, end) of the order by expert."""
    (B, _), F = routed.x.shape, routed.W.shape[0]
    n_rows, capacity = positions[1] - positions[0], own.candidates.shape[1]
    for part in parts(F // routed.n_experts, k, capacity):
        _product(routed, own, positions, part)
        length = max(_SHORTEST, gpu.next_power_of_two(part.held + part.n))
        rows = _lists_a_block(length)
        warps = min(16, max(4, 4 * length // _ENTRIES))
        sizes = {"CAPACITY": capacity, "LENGTH": length, "ROWS": rows}
        _keep[(triton.cdiv(n_rows, rows),)](*own, n_rows, F, k, **sizes, num_warps=warps)
    best, rows = gpu.next_power_of_two(k), _lists_a_block(schedule.capacity(k))
    _write[(triton.cdiv(n_rows, rows),)](
        own.candidates,
        routed.tokens,
        *results,
        positions[0],
        n_rows,
        B,
        k,
        CAPACITY=capacity,
        BEST=best,
        STEP=min(best, max(1, 4 * _ENTRIES // (rows * best))),
        ROWS=rows,
        num_warps=4,
    )


def _product(
    routed: RoutedOperands, own: TokenLists, positions: tuple[int, int], part: LatentPart
) -> None:
    x, W, b, tokens, starts = routed
    tile = _tile(x)
    n_tiles = triton.cdiv(positions[1] - positions[0], tile.rows) + routed.n_experts
    _score[(n_tiles, triton.cdiv(part.n, tile.columns))](
        x,
        W,
        b,
        tokens,
        starts,
        own.counts,
        own.candidates,
        *positions,
        *part,
        x.shape[0],
        *W.shape,
        routed.n_experts,
        CAPACITY=own.candidates.shape[1],
        EXPERTS=max(_SHORTEST, gpu.next_power_of_two(routed.n_experts)),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth // x.element_size(),
        WIDEN=gpu.interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _tile(x: torch.Tensor) -> ProductTile:
    if gpu.interpreted():
        return _INTERPRETED
    return _SMALL_TILE if x.dtype == torch.float32 or x.shape[1] % 16 else _TILE


def _lists_a_block(length: int) -> int:
    return min(_MOST_LISTS, max(1, _ENTRIES // length))
