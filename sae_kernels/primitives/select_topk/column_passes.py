"""select_topk on GPUs: exact selection from a product that is never stored.

A sample of the columns gives each row a threshold: the k-th best of what was seen, which is never
above that of all. Then columns are scored in passes (``schedule.py``). The kernel that
multiplies lets through only entries that are not below their row's threshold and appends them to
the row's list; after each pass the list is cut back to its k best, which raises the threshold.

A list that overflowed is noticed by its count, which goes on past the capacity. Of what it does
hold the k-th best is a threshold all the same, so at the end such rows are scored once more with
the one they have then, which few scores pass. What overflows even now (of many equal scores) is
scored in natural order with a list that cannot overflow. So the result is exact for any input, and
only the speed depends on it.

What multiplies differs between backends; the lists and everything done to them are shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels import gpu
from sae_kernels.primitives import candidate_lists, schedule
from sae_kernels.primitives.candidate_lists import (
    OF_A_PASS,
    OF_THE_LAST_PASS,
    OF_THE_REPEAT,
    OF_THE_SAMPLE,
    CandidateLists,
    ListRows,
    Overflow,
)
from sae_kernels.primitives.products import tile_for
from sae_kernels.primitives.select_topk.rescore import rescore_overflowed
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.primitives.products import ProductTile
    from sae_kernels.primitives.select_topk.screen import Screen

# What a block holds without spilling registers: entries of lists; latents and bytes of d_in of the
# products by pointers. Triton's interpreter is slow by operation, whatever its size.
_ENTRIES, _LATENTS, _DEPTH = (1 << 16, 512, 1024) if gpu.interpreted() else (1024, 64, 128)
# Lists are padded to whole tiles of rows, of any kernel's.
_SAMPLE_ROWS: int = candidate_lists.ROWS_A_FLAG.value
_RESCORED_ROWS = 32


class EncoderOperands(NamedTuple):
    """The arguments of select_topk, packed, for the rows that are selected together.

    Attributes:
        x, W, b, rank_scale, by_magnitude: as of select_topk.
        listed: whose rows those of x are.
        screen: what bounds their scores from above, if anything does; not those by magnitude.
    """

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor | None
    rank_scale: torch.Tensor | None
    listed: ListRows = ListRows()
    screen: Screen | None = None
    by_magnitude: bool = False

    @property
    def n_latents(self) -> int:
        """How many latents a row is chosen from."""
        n = self.listed.n_latents
        return self.W.shape[0] if n is None else n


class ColumnPass(NamedTuple):
    """What a pass scores.

    Attributes:
        pending: int32, for every 128 rows whether they are scored.
        start, stop: positions in the visit of all columns.
        stride: of the visit.
    """

    pending: torch.Tensor
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
    b, rank_scale = (packed(t) for t in operands[2:4])
    listed = operands.listed
    n_tokens = x.shape[0] if listed.n_tokens is None else listed.n_tokens
    values = x.new_empty((n_tokens, k), dtype=torch.float32)
    indices = x.new_empty((n_tokens, k), dtype=torch.int32)
    # Rows that only fill tiles have no part in how many lists the cache holds.
    n_parts = -(-n_tokens // schedule.rows_at_once(schedule.capacity(k)))
    flags = -(-x.shape[0] // _SAMPLE_ROWS)
    at_once = max(1, -(-flags // max(1, n_parts))) * _SAMPLE_ROWS
    for start in range(0, x.shape[0], at_once):
        part = slice(start, start + at_once)
        if listed.tokens is None or listed.firsts is None:
            rows, results = listed, (values[part], indices[part])
        else:
            own = slice(start // _SAMPLE_ROWS, (start + at_once) // _SAMPLE_ROWS)
            rows = listed._replace(tokens=listed.tokens[part], firsts=listed.firsts[own])
            results = (values, indices)
        screen = None if operands.screen is None else operands.screen.part(part)
        some = EncoderOperands(x[part], W, b, rank_scale, rows, screen, operands.by_magnitude)
        _select_rows(some, *results, tile, encode_pass)
    return values, indices


def _select_rows(
    operands: EncoderOperands,
    values: torch.Tensor,
    indices: torch.Tensor,
    tile: ProductTile,
    encode_pass: Callable[[EncoderOperands, CandidateLists, ColumnPass, ProductTile], None],
) -> None:
    x, _, _, rank_scale, listed, screen, by_magnitude = operands
    B, k, n_latents = x.shape[0], values.shape[1], operands.n_latents
    capacity = schedule.capacity(k)
    n_sampled, at_once = min(n_latents, capacity), _rows_a_block(capacity)
    flags = -(-B // _SAMPLE_ROWS)
    padded = flags * _SAMPLE_ROWS
    counts, incomplete = x.new_empty((2, padded), dtype=torch.int32)
    lists = CandidateLists(
        counts,
        x.new_empty(padded, dtype=torch.float32),
        x.new_empty((padded, capacity), dtype=torch.int64),
    )
    pending = x.new_empty((2, flags), dtype=torch.int32)
    n, rows = x.new_empty(1, dtype=torch.int32), x.new_empty(B, dtype=torch.int32)
    overflow = Overflow(incomplete, pending, n, rows)

    def keep_best(purpose: Any) -> None:
        # Its number: as a constant each purpose would be a kernel of its own.
        candidate_lists.keep_best[(-(-B // at_once),)](
            *lists, incomplete, pending, rank_scale, *listed[:2], n_latents, B, k,
            purpose.value, capacity, at_once, by_magnitude, num_warps=4,
        )  # fmt: skip

    _sample(operands, lists, overflow, n_sampled)
    if n_sampled == n_latents:
        keep_best(OF_A_PASS)
    else:
        keep_best(OF_THE_SAMPLE)
        n_tiles = -(-n_latents // tile.columns)
        stride = schedule.stride(n_tiles)
        room = capacity if screen is None else capacity // 2  # for what passes and does not win
        for start, stop in schedule.column_passes(n_tiles, tile.columns, k, room):
            encode_pass(operands, lists, ColumnPass(pending[0], start, stop, stride), tile)
            keep_best(OF_A_PASS if stop < n_tiles else OF_THE_LAST_PASS)
        if screen is not None:  # too much passes it where a list has overflowed
            operands, tile = operands._replace(screen=None), tile_for(x, operands.W)
            n_tiles = -(-n_latents // tile.columns)
            stride = schedule.stride(n_tiles)
        encode_pass(operands, lists, ColumnPass(pending[1], 0, n_tiles, stride), tile)
        keep_best(OF_THE_REPEAT)
    _write(operands, lists, overflow, values, indices)


def _sample(
    operands: EncoderOperands, lists: CandidateLists, overflow: Overflow, n_sampled: int
) -> None:
    x, W, b, _, listed, *_ = operands
    padded, capacity = lists.candidates.shape
    columns = min(_LATENTS, capacity)
    candidate_lists.sample[(padded // _SAMPLE_ROWS, capacity // columns)](
        x,
        W,
        b,
        *lists,
        overflow.incomplete,
        overflow.pending,
        overflow.n,
        listed.tokens,
        listed.firsts,
        operands.n_latents,
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
    operands: EncoderOperands,
    lists: CandidateLists,
    overflow: Overflow,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    x, W, b, rank_scale, listed, _, by_magnitude = operands
    B, k, capacity = x.shape[0], values.shape[1], lists.candidates.shape[1]
    best, at_once = gpu.next_power_of_two(k), _rows_a_block(capacity)
    results = (values, indices, overflow.n, overflow.rows)
    step = min(best, max(1, 4 * _ENTRIES // (at_once * best)))
    shared = {"CAPACITY": capacity, "BEST": best, "STEP": step, "BY_MAGNITUDE": by_magnitude}
    candidate_lists.write_complete[(-(-B // at_once),)](
        lists.counts,
        lists.candidates,
        overflow.incomplete,
        rank_scale,
        *results,
        listed.tokens,
        B,
        k,
        **shared,
        ROWS=at_once,
        num_warps=4,
    )
    columns = min(_LATENTS, capacity // 2)
    rescore_overflowed[(gpu.multiprocessors(x.device),)](
        x,
        W,
        b,
        rank_scale,
        *lists,
        *results,
        listed.tokens,
        listed.firsts,
        operands.n_latents,
        B,
        *W.shape,
        k,
        **shared,
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
