"""select_topk on GPUs: exact selection from a product that is never stored.

A sample of the columns gives each row a threshold: the k-th best of what was seen, which is never
above that of all. Then columns are scored slab by slab (``schedule.py``). The kernel that
multiplies lets through only entries that are not below their row's threshold and appends them to
the row's list; after each slab the list is cut back to its k best, which raises the threshold.

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
from sae_kernels.primitives.select_topk import lists as kernels
from sae_kernels.primitives.select_topk import schedule
from sae_kernels.tensors import packed

if TYPE_CHECKING:
    from collections.abc import Callable

# What a block holds without spilling registers: entries of lists; latents and bytes of d_in of the
# products by pointers. Triton's interpreter is slow by operation, whatever its size.
_ENTRIES, _LATENTS, _DEPTH = (1 << 16, 512, 1024) if gpu.interpreted() else (1024, 64, 128)
_SAMPLE_ROWS, _RESCUE_ROWS = 128, 32  # lists are padded to whole tiles of rows, of any kernel's


class Tile(NamedTuple):
    """A block's share of the product and what it is launched with.

    Attributes:
        rows, columns: tokens and latents.
        depth: bytes of d_in that are loaded at a time.
        warps, stages: of the launch.
        chunks: parts of the columns whose entries are let through one after the other.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    chunks: int


class Operands(NamedTuple):
    """The arguments of select_topk, packed, for the rows that are selected together."""

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor | None
    rank_scale: torch.Tensor | None


class Lists(NamedTuple):
    """What rows hold, padded to whole tiles of rows so that no row needs a mask.

    Attributes:
        counts: int32 [rows], entries let through; more than the capacity: some are missing.
        thresholds: fp32 [rows], the key of the k-th best; NaN: only NaN may win.
        candidates: int64 [rows, capacity], the fp32 bits of h below the latent's number.
    """

    counts: torch.Tensor
    thresholds: torch.Tensor
    candidates: torch.Tensor


class Slab(NamedTuple):
    """Positions [start, stop) of the visit, and its stride."""

    start: int
    stop: int
    stride: int


def refuses(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
) -> str | None:
    """Why these kernels cannot select, or None."""
    if k > schedule.LARGEST_K:
        return f"its lists hold k <= {schedule.LARGEST_K}, got k = {k}"
    return None


def describable(*matrices: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator reads them: rows of whole 16 bytes, aligned.

    What is not contiguous will be copied to where it is aligned.
    """
    return all(
        matrix.shape[1] * matrix.element_size() % 16 == 0
        and (matrix.data_ptr() % 16 == 0 or not matrix.is_contiguous())
        for matrix in matrices
    )


def select(
    operands: Operands,
    k: int,
    tile: Tile,
    encode_slab: Callable[[Operands, Lists, Slab, Tile], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects from what ``encode_slab`` lets through, as many rows at once as fit in cache."""
    x, W = operands.x.contiguous(), operands.W.contiguous()
    b, rank_scale = (packed(t) for t in operands[2:])
    values = x.new_empty((x.shape[0], k), dtype=torch.float32)
    indices = x.new_empty((x.shape[0], k), dtype=torch.int32)
    at_once = schedule.rows_at_once(schedule.capacity(k))
    for start in range(0, x.shape[0], at_once):
        part = slice(start, start + at_once)
        rows = Operands(x[part], W, b, rank_scale)
        _select_rows(rows, values[part], indices[part], tile, encode_slab)
    return values, indices


def _select_rows(
    operands: Operands,
    values: torch.Tensor,
    indices: torch.Tensor,
    tile: Tile,
    encode_slab: Callable[[Operands, Lists, Slab, Tile], None],
) -> None:
    x, W, _, rank_scale = operands
    (B, k), F = values.shape, W.shape[0]
    capacity = schedule.capacity(k)
    n_sampled, at_once = min(F, capacity), _rows_a_block(capacity)
    padded = triton.cdiv(B, _SAMPLE_ROWS) * _SAMPLE_ROWS
    lists = Lists(
        x.new_full((padded,), n_sampled, dtype=torch.int32),
        x.new_full((padded,), torch.nan, dtype=torch.float32),
        x.new_empty((padded, capacity), dtype=torch.int64),
    )

    def keep_best() -> None:
        grid = (triton.cdiv(B, at_once),)
        kernels.keep_best[grid](*lists, rank_scale, B, F, k, capacity, at_once, num_warps=4)

    _sample(operands, lists, n_sampled)
    keep_best()
    if n_sampled < F:
        lists.counts.zero_()  # of the sample only the thresholds are needed
        n_tiles = triton.cdiv(F, tile.columns)
        for start, stop in schedule.slabs(n_tiles, tile.columns, k, capacity):
            encode_slab(operands, lists, Slab(start, stop, schedule.stride(n_tiles)), tile)
            keep_best()
    _write(operands, lists, values, indices)


def _sample(operands: Operands, lists: Lists, n_sampled: int) -> None:
    x, W, b, _ = operands
    padded, capacity = lists.candidates.shape
    columns = min(_LATENTS, capacity)
    kernels.sample[(padded // _SAMPLE_ROWS, capacity // columns)](
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


def _write(operands: Operands, lists: Lists, values: torch.Tensor, indices: torch.Tensor) -> None:
    x, W, _, rank_scale = operands
    (B, k), capacity = values.shape, lists.candidates.shape[1]
    best, at_once = gpu.next_power_of_two(k), _rows_a_block(capacity)
    n_overflowed = x.new_zeros((1,), dtype=torch.int32)
    overflowed = x.new_empty((B,), dtype=torch.int32)
    results = (values, indices, n_overflowed, overflowed)
    step = min(best, max(1, 4 * _ENTRIES // (at_once * best)))
    emission = {"CAPACITY": capacity, "BEST": best, "STEP": step}
    kernels.emit_sorted[(triton.cdiv(B, at_once),)](
        lists.counts,
        lists.candidates,
        rank_scale,
        *results,
        B,
        k,
        **emission,
        ROWS=at_once,
        num_warps=4,
    )
    columns = min(_LATENTS, capacity // 2)
    kernels.rescue[(gpu.multiprocessors(x.device),)](
        *operands,
        *lists,
        *results,
        *W.shape,
        k,
        **emission,
        LENGTH=min(capacity, gpu.next_power_of_two(k + columns)),
        KEPT=min(_RESCUE_ROWS, at_once),
        ROWS=_RESCUE_ROWS,
        COLUMNS=columns,
        DEPTH=_DEPTH // x.element_size(),
        WIDEN=gpu.interpreted(),
        num_warps=8,
        num_stages=3,
    )


def _rows_a_block(capacity: int) -> int:
    return min(_SAMPLE_ROWS, max(1, _ENTRIES // capacity))
