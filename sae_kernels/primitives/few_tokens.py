"""Scores of a few tokens on GPUs: blocks share the latents, so that W is read once.

A block multiplies a tile of W's rows with all tokens. It stores the scores and, of every token, one
number that lets the second kernel pass over most tiles: the place of the tile's best score in the
selection, or how many of its scores are above their bounds.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.candidate_lists import bias, packed, places
from sae_kernels.primitives.products import product
from sae_kernels.primitives.tensors import packed as in_order

# W's rows are the rows of the matrix instruction, tokens its columns: so many, there or not, that
# an architecture takes the instruction of larger products, which adds up in the same order.
_MOST_TOKENS = 16
_MOST_SCORES = 1 << 23  # stored at a time: 32 MiB
# Of one token: tiles, and latents in those of the k best. A block holds them in registers.
_MOST_LOOKED_AT = 8192
_TILE, _WIDE_TILE = 64, 128  # latents
# Bytes of d_in at a time; Triton's interpreter is slow by operation, whatever its size.
_DEPTH = 1024 if gpu.interpreted() else 128


@functools.cache
def tile_of_few(n_tokens: int, d_in: int, n_latents: int, k: int = 1) -> int | None:
    """How many latents a tile has where these kernels take a call; None where they do not.

    Args:
        n_tokens: tokens of the call.
        d_in: of W. Of 1 Triton makes a constant, and the product of Hopper, a loop no more, is
            given registers that are written after its fence.
        n_latents: latents that each chooses from.
        k: how many it keeps, of a selection by rank.
    """
    tile = _TILE if n_latents <= _TILE * _MOST_LOOKED_AT else _WIDE_TILE
    few = 1 <= n_tokens <= _MOST_TOKENS and 1 <= n_latents * n_tokens <= _MOST_SCORES and d_in > 1
    looked_at = max(-(-n_latents // tile), gpu.next_power_of_two(k) * tile)
    return tile if few and looked_at <= _MOST_LOOKED_AT else None


def note(otherwise: str | None) -> str:
    """What `explain` says of these kernels, before what it says of calls that they do not take."""
    few = (
        f"up to {_MOST_TOKENS} tokens with {_MOST_SCORES} scores (k at most "
        f"{_MOST_LOOKED_AT // _TILE}, above {_TILE * _MOST_LOOKED_AT} latents "
        f"{_MOST_LOOKED_AT // _WIDE_TILE}): blocks share the latents and read W once"
    )
    return few if otherwise is None else f"{few}; {otherwise}"


def score(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    tile: int,
    rank_scale: torch.Tensor | None = None,
    by_magnitude: bool = False,
    *,
    bounds: torch.Tensor | None = None,
    routes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores all tokens in one launch, with routes each with its expert's latents alone.

    Args:
        x, W, b, rank_scale, by_magnitude: as of select_topk; rank_scale is contiguous.
        tile: see `tile_of_few`.
        bounds: of select_threshold, contiguous; None for a selection by rank.
        routes: tokens and starts of select_topk_routed, contiguous.

    Returns:
        Scores fp32 [B, width], each token's with the latents that it chooses from, and [B, tiles]:
        int64 the largest of the `places` of a tile's scores, or int32 how many are above bounds.
    """
    B, D = x.shape
    tokens, starts = (None, None) if routes is None else routes
    n_experts = 1 if starts is None else starts.shape[0] - 1
    width = W.shape[0] // n_experts
    n_tiles = -(-width // tile)
    h = x.new_empty((B, width), dtype=torch.float32)
    found = x.new_empty((B, n_tiles), dtype=torch.int64 if bounds is None else torch.int32)
    _score[(n_experts * n_tiles,)](
        x.contiguous(),
        W.contiguous(),
        in_order(b),
        rank_scale,
        bounds,
        tokens,
        starts,
        h,
        found,
        B,
        D,
        width,
        n_tiles,
        ROWS=gpu.next_power_of_two(B) if x.dtype == torch.float32 else _MOST_TOKENS,
        TILE=tile,
        DEPTH=_DEPTH // x.element_size(),
        WIDEN=gpu.interpreted(),
        BY_MAGNITUDE=by_magnitude,
        num_warps=4,
        num_stages=4,
    )
    return h, found


@triton.jit(do_not_specialize=["B"])
def _score(
    x,
    W,
    b,
    rank_scale,
    bounds,
    tokens,
    starts,
    scores,
    found,
    B,
    D,
    width,
    n_tiles,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
):
    """Scores one tile of latents for all tokens, or for those of the tile's expert."""
    expert, tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    token = tl.arange(0, ROWS)
    if starts is not None:
        start = tl.minimum(tl.maximum(tl.load(starts + expert), 0), B)
        token += start
        end = tl.minimum(tl.load(starts + expert + 1), B)
        token = tl.load(tokens + token, mask=token < end, other=-1)
    live = (token >= 0) & (token < B)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    local = tile * TILE + tl.arange(0, TILE)
    first = expert * width
    last = first + width - 1
    latents = first + local
    h = product(W, x, tl.minimum(latents, last), tl.where(live, token, 0), D, DEPTH, WIDEN)
    h += (bias(b, latents, last + 1) + 0.0)[:, None]  # -0 becomes +0
    there = (local < width)[:, None] & live[None, :]
    tl.store(scores + (token[None, :] * width + local[:, None]), h, mask=there)
    if bounds is None:
        place = places(packed(h, latents[:, None]), there, rank_scale, BY_MAGNITUDE)
        of_tile = tl.max(place, 0)
    else:
        bound = tl.load(bounds + latents, mask=local < width, other=0.0)[:, None]
        of_tile = tl.sum((there & ~(h <= bound)).to(tl.int32), 0)
    tl.store(found + token * n_tiles + tile, of_tile, mask=live)
