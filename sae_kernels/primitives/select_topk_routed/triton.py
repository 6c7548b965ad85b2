"""select_topk_routed in Triton: select_topk's passes over columns, of each expert's own.

The tokens are laid out in the order of their experts, each expert's from a whole tile of rows on,
so that a tile of rows is multiplied with one expert's latents. Everything else is what select_topk
does: a pass scores the same part of every expert's latents, a threshold lets few scores through.

Where an expert's rows begin the host does not know, only that rows / ROWS tiles, rounded up, and
one more for each expert are enough; a tile of nobody is passed over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives import schedule
from sae_kernels.primitives.candidate_lists import ROWS_A_FLAG, ListRows
from sae_kernels.primitives.few_tokens import tile_of_few
from sae_kernels.primitives.select_topk import column_passes, few_tokens
from sae_kernels.primitives.select_topk import triton as whole
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    import torch

note = whole.note
_MOST_EXPERTS = 512  # as many as route_top1 takes; every block looks through all of them
_FEWEST = 16
_ROWS: int = ROWS_A_FLAG.value
_COPIED = 1024 if gpu.interpreted() else 128  # columns of x a block


@triton.jit
def _tile_of(nth, starts, B, E, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of the nth tile, the position of its first token and where the expert's end.

    Beyond the last tile there is nobody: the end is 0.
    """
    e = tl.arange(0, EXPERTS)
    first = tl.load(starts + e, mask=e < E, other=B)
    last = tl.load(starts + e + 1, mask=e < E, other=B)
    first = tl.minimum(tl.maximum(first, 0), B)
    last = tl.minimum(tl.maximum(last, first), B)
    tiles = tl.cdiv(last - first, ROWS)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= nth) & (nth < before + tiles)
    expert = tl.max(tl.where(mine, e, 0), 0)
    position = tl.sum(tl.where(mine, first + (nth - before) * ROWS, 0), 0)
    return expert, position, tl.sum(tl.where(mine, last, 0), 0)


@triton.jit
def _lay_out(
    x,
    tokens,
    starts,
    laid_out,
    token_of,
    firsts,
    B,
    D,
    E,
    n_latents,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copies the tokens of a tile, a part of their width, and notes whose they are."""
    expert, position, end = _tile_of(tl.program_id(0), starts, B, E, ROWS, EXPERTS)
    positions = position + tl.arange(0, ROWS)
    token = tl.load(tokens + positions, mask=positions < end, other=-1)
    token = tl.where((token >= 0) & (token < B), token, -1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(1) == 0:
        tl.store(token_of + rows, token)
        tl.store(firsts + tl.program_id(0), expert * n_latents)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    part = tl.load(
        x + token.to(tl.int64)[:, None] * D + columns,
        mask=(token >= 0)[:, None] & (columns < D),
        other=0.0,
    )
    tl.store(laid_out + rows.to(tl.int64)[:, None] * D + columns, part, mask=columns < D)


def refuses(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    *_: object,
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
    narrow: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects a few tokens' in two launches; others in passes, laid out by expert."""
    n_experts = starts.shape[0] - 1
    if n_experts == 1:
        return whole.run(x, W, b, k, None)
    routes, n_latents = (packed(tokens), packed(starts)), W.shape[0] // n_experts
    tile = tile_of_few(*x.shape, n_latents, k)
    if tile is not None:
        return few_tokens.select(x, W, b, None, k, tile, routes=routes)
    laid_out, listed = _laid_out(packed(x), *routes, n_latents)
    operands = column_passes.EncoderOperands(laid_out, packed(W), packed(b), None, listed)
    return whole.selected(operands, k)


def _laid_out(
    x: torch.Tensor, tokens: torch.Tensor, starts: torch.Tensor, n_latents: int
) -> tuple[torch.Tensor, ListRows]:
    """The tokens by expert in whole tiles, and whose rows they are."""
    (B, D), n_experts = x.shape, starts.shape[0] - 1
    n_tiles = -(-B // _ROWS) + n_experts if B else 0
    laid_out = x.new_empty((n_tiles * _ROWS, D))
    token_of = tokens.new_empty(n_tiles * _ROWS)
    firsts = tokens.new_empty(n_tiles)
    if B:
        _lay_out[(n_tiles, -(-D // _COPIED))](
            x,
            tokens,
            starts,
            laid_out,
            token_of,
            firsts,
            B,
            D,
            n_experts,
            n_latents,
            EXPERTS=max(_FEWEST, gpu.next_power_of_two(n_experts)),
            ROWS=_ROWS,
            COLUMNS=_COPIED,
            num_warps=8,
        )
    return laid_out, ListRows(token_of, firsts, n_latents, B)
