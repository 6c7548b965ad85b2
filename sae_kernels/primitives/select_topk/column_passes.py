"""select_topk on GPUs: exact selection from a product that is never stored.

A sample of the columns gives each row a threshold: the k-th best of what was seen, which is never
above that of all. Then columns are scored in passes (``schedule.py``). The kernel that
multiplies lets through only entries that are not below their row's threshold and appends them to
the row's list; after each pass the list is cut back to its k best, which raises the threshold.

A list that overflowed is noticed by its count, which goes on past the capacity: such rows are
scored again in natural order with a list that cannot overflow. So the result is exact for any
input, and only the speed depends on it.

What multiplies differs between backends; the lists and everything done to them are shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from sae_kernels import gpu
from sae_kernels.primitives import candidate_lists, schedule
from sae_kernels.primitives.candidate_lists import CandidateLists
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.primitives.products import ProductTile

# What a block holds without spilling registers: entries of lists; latents and bytes of d_in of the
# products by pointers. Triton's interpreter is slow by operation, whatever its size.
_ENTRIES, _LATENTS, _DEPTH = (1 << 16, 512, 1024) if gpu.interpreted() else (1024, 64, 128)
_SAMPLE_ROWS, _RESCORED_ROWS = 128, 32  # lists are padded to whole tiles of rows, of any kernel's


class EncoderOperands(NamedTuple):
    """The arguments of select_topk, packed, for the rows that are selected together."""

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor | None
    rank_scale: torch.Tensor | None


class ColumnPass(NamedTuple):
    """Positions [start, stop) of the visit of all columns, and its stride."""

    start: int
    stop: int
    stride: int


def refuses(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, k: int, *_: object
) -> str | None:
    """Why these kernels cannot select, or None."""
    if k > schedule.LARGEST_K:
        return f"its lists hold k <= {schedule.LARGEST_K}, got k = {k}"
    return None


def select(
    operands: EncoderOperands,
    k: int,
    tile: ProductTile,
    encode_pass: Callable[[EncoderOperands, CandidateLists, ColumnPass, ProductTile], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects among what ``encode_pass`` appends, for as many rows at once as fit in cache."""
    x, W = operands.x.contiguous(), operands.W.contiguous()
    b, rank_scale = (packed(t) for t in operands[2:])
    values = x.new_empty((x.shape[0], k), dtype=torch.float32)
    indices = x.new_empty((x.shape[0], k), dtype=torch.int32)
    at_once = schedule.rows_at_once(schedule.capacity(k))
    for start in range(0, x.shape[0], at_once):
        part = slice(start, start + at_once)
        rows = EncoderOperands(x[part], W, b, rank_scale)
        _select_rows(rows, values[part], indices[part], tile, encode_pass)
    return values, indices


def _select_rows(
    operands: EncoderOperands,
    values: torch.Tensor,
    indices: torch.Tensor,
    tile: ProductTile,
    encode_pass: Callable[[EncoderOperands, CandidateLists, ColumnPass, ProductTile], None],
) -> None:
    x, W, _, rank_scale = operands
    (B, k), F = values.shape, W.shape[0]
    capacity = schedule.capacity(k)
    n_sampled, at_once = min(F, capacity), _rows_a_block(capacity)
    padded = triton.cdiv(B, _SAMPLE_ROWS) * _SAMPLE_ROWS
    lists = CandidateLists(
        x.new_full((padded,), n_sampled, dtype=torch.int32),
        x.new_full((padded,), torch.nan, dtype=torch.float32),
        x.new_empty((padded, capacity), dtype=torch.int64),
    )

    def keep_best() -> None:
        grid = (triton.cdiv(B, at_once),)
        candidate_lists.keep_best[grid](*lists, rank_scale, B, F, k, capacity, at_once, num_warps=4)

    _sample(operands, lists, n_sampled)
    keep_best()
    if n_sampled < F:
        lists.counts.zero_()  # of the sample only the thresholds are needed
        n_tiles = triton.cdiv(F, tile.columns)
        for start, stop in schedule.column_passes(n_tiles, tile.columns, k, capacity):
            encode_pass(operands, lists, ColumnPass(start, stop, schedule.stride(n_tiles)), tile)
            keep_best()
    _write(operands, lists, values, indices)


def _sample(operands: EncoderOperands, lists: CandidateLists, n_sampled: int) -> None:
    x, W, b, _ = operands
    padded, capacity = lists.candidates.shape
    columns = min(_LATENTS, capacity)
    candidate_lists.sample[(padded // _SAMPLE_ROWS, capacity // columns)](
        x,
        W,
        b,
        lists.candidates,
        x.shape[0],
        *W.shape,
        n_sampled,
        CAPACITY=capacity,
        ROWS=_SAMPLE_ROWS,
        COLUMNS=columns,
        DEPTH=_DEPTH // x.element_size(),
        WIDEN=gpu.interpreted(),
        num_warps=8,
        num_stages=3,
    )


def _write(
    operands: EncoderOperands, lists: CandidateLists, values: torch.Tensor, indices: torch.Tensor
) -> None:
    x, W, _, rank_scale = operands
    (B, k), capacity = values.shape, lists.candidates.shape[1]
    best, at_once = gpu.next_power_of_two(k), _rows_a_block(capacity)
    n_overflowed = x.new_zeros((1,), dtype=torch.int32)
    overflowed = x.new_empty((B,), dtype=torch.int32)
    results = (values, indices, n_overflowed, overflowed)
    step = min(best, max(1, 4 * _ENTRIES // (at_once * best)))
    sizes = {"CAPACITY": capacity, "BEST": best, "STEP": step}
    candidate_lists.write_complete[(triton.cdiv(B, at_once),)](
        lists.counts,
        lists.candidates,
        rank_scale,
        *results,
        B,
        k,
        **sizes,
        ROWS=at_once,
        num_warps=4,
    )
    columns = min(_LATENTS, capacity // 2)
    candidate_lists.rescore_overflowed[(gpu.multiprocessors(x.device),)](
        *operands,
        *lists,
        *results,
        *W.shape,
        k,
        **sizes,
        LENGTH=min(capacity, gpu.next_power_of_two(k + columns)),
        KEPT=min(_RESCORED_ROWS, at_once),
        ROWS=_RESCORED_ROWS,
        COLUMNS=columns,
        DEPTH=_DEPTH // x.element_size(),
        WIDEN=gpu.interpreted(),
        num_warps=8,
        num_stages=3,
    )


def _rows_a_block(capacity: int) -> int:
    return min(_SAMPLE_ROWS, max(1, _ENTRIES // capacity))
