"""select_topk of a few tokens in Triton: two launches, with lists that cannot overflow.

The first scores all latents and notes the best of every tile of them (`primitives.few_tokens`). A
token's k best latents lie in the k tiles with the best of these: whatever is in another tile has
those k before it. So the second takes these tiles' scores, k times a tile, and of them the k best.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.candidate_lists import (
    NO_PLACE,
    last_place,
    latent_of,
    packed,
    places,
    write_selected,
)
from sae_kernels.primitives.few_tokens import score
from sae_kernels.primitives.tensors import packed as in_order

_ENTRIES = 1 << 16 if gpu.interpreted() else 1 << 12  # compared at a time
_WIDE = 4096  # entries from which on a block has twice the warps


def select(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    k: int,
    tile: int,
    by_magnitude: bool = False,
    routes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects as select_topk, with routes as select_topk_routed; see `few_tokens.score`."""
    rank_scale = in_order(rank_scale)
    h, best_of_tiles = score(x, W, b, tile, rank_scale, by_magnitude, routes=routes)
    (B, width), n_tiles, best = h.shape, best_of_tiles.shape[1], gpu.next_power_of_two(k)
    values = x.new_empty((B, k), dtype=torch.float32)
    indices = x.new_empty((B, k), dtype=torch.int32)
    tiles = gpu.next_power_of_two(n_tiles)
    _merge[(B,)](
        h,
        best_of_tiles,
        x.new_empty((B, best), dtype=torch.int64),
        rank_scale,
        values,
        indices,
        width,
        n_tiles,
        k,
        TILES=tiles,
        TILE=tile,
        BEST=best,
        STEP=min(best, max(1, _ENTRIES // best)),
        BY_MAGNITUDE=by_magnitude,
        num_warps=8 if max(tiles, best * tile) <= _WIDE else 16,
    )
    return values, indices


@triton.jit
def _merge(
    scores,
    best_of_tiles,
    lists,
    rank_scale,
    values,
    indices,
    width,
    n_tiles,
    k,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BEST: tl.constexpr,
    STEP: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
):
    """Selects the k best latents of a token among those of the tiles with the k best."""
    row = tl.program_id(0) + tl.arange(0, 1)
    live = row >= 0
    tiles = best_of_tiles + row[:, None] * n_tiles
    nth = tl.arange(0, TILES)[None, :]
    place = tl.load(tiles + nth, mask=nth < n_tiles, other=NO_PLACE)
    chosen = (place >= last_place(place, live, k)[:, None]) & (nth < n_tiles)
    latent = latent_of(place)
    start = latent - latent % width % TILE  # of its tile
    tl.debug_barrier()  # other threads' places are overwritten
    tl.store(tiles + (tl.cumsum(chosen.to(tl.int32), 1) - 1), start.to(tl.int64), mask=chosen)
    tl.debug_barrier()
    slot = tl.arange(0, BEST * TILE)[None, :]
    found = slot // TILE < tl.minimum(k, n_tiles)
    start = tl.load(tiles + slot // TILE, mask=found, other=0).to(tl.int32)
    local = start % width + slot % TILE
    found = found & (local < width)
    h = tl.load(scores + (row[:, None] * width + local), mask=found, other=0.0)
    entries = packed(h, start + slot % TILE)
    place = places(entries, found, rank_scale, BY_MAGNITUDE)
    wins = (place >= last_place(place, live, k)[:, None]) & found
    target = tl.cumsum(wins.to(tl.int32), 1) - 1
    # More than k: equal places, of a token that routes left out.
    tl.store(lists + (row[:, None] * BEST + target), entries, mask=wins & (target < k))
    tl.debug_barrier()
    outputs = (values, indices)
    write_selected(row, row, live, lists, rank_scale, *outputs, k, BEST, BEST, STEP, BY_MAGNITUDE)
