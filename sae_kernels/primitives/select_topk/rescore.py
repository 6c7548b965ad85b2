"""The way out for rows whose lists overflowed: a Triton kernel that needs no luck and some time."""

from __future__ import annotations

import triton
import triton.language as tl

from sae_kernels.primitives.candidate_lists import (
    bias,
    first_of,
    keep,
    ordered,
    packed,
    rank_key,
    token_of,
    write_selected,
)
from sae_kernels.primitives.products import product


@triton.jit
def rescore_overflowed(
    x,
    W,
    b,
    rank_scale,
    counts,
    thresholds,
    candidates,
    values,
    indices,
    n_overflowed,
    overflowed,
    tokens,
    firsts,
    n_latents,
    B,
    F,
    D,
    k,
    CAPACITY: tl.constexpr,
    LENGTH: tl.constexpr,
    BEST: tl.constexpr,
    STEP: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
):
    """Scores the rows whose lists overflowed again, column by column, and selects for them.

    The host never learns how many there are: blocks find out and mostly leave at once. Columns come
    in natural order and a list takes one tile of them after it was cut back, so it cannot overflow;
    a tile in which no row has a winner is passed over. Equal keys that come later do not win.
    """
    n = tl.load(n_overflowed)
    for first in tl.range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        taken = first + tl.arange(0, ROWS)
        live = taken < n
        rows = tl.load(overflowed + taken, mask=live, other=0)
        tl.store(counts + rows, 0, mask=live)
        before = first_of(rows, firsts)[:, None]
        tl.debug_barrier()
        for column in tl.range(0, F, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            own = live[:, None] & (columns >= before) & (columns < before + n_latents)
            # A product of no width where the latents are nobody's.
            width = D * tl.max(tl.max(own.to(tl.int32), 1), 0)
            h = product(x, W, rows, tl.minimum(columns, F - 1), width, DEPTH, WIDEN)
            h += bias(b, columns, F)[None, :]
            key = rank_key(h, columns[None, :], columns[None, :] < F, rank_scale, BY_MAGNITUDE)
            count = tl.load(counts + rows, mask=live, other=0)
            worst = ordered(tl.load(thresholds + rows, mask=live, other=0.0))
            wins = own & ((ordered(key) > worst[:, None]) | (count < k)[:, None])
            if tl.max(tl.max(wins.to(tl.int32), 1), 0) > 0:
                slots = count[:, None] + tl.arange(0, COLUMNS)[None, :]
                row_lists = candidates + rows.to(tl.int64)[:, None] * CAPACITY
                entries = packed(h, tl.where(own, columns[None, :], F))
                tl.store(row_lists + slots, entries, mask=live[:, None])
                tl.store(counts + rows, count + COLUMNS, mask=live)
                tl.debug_barrier()
                for part in tl.range(first, tl.minimum(first + ROWS, n), KEPT):
                    some = part + tl.arange(0, KEPT)
                    kept_rows = tl.load(overflowed + some, mask=some < n, other=0)
                    n_kept, last, _ = keep(
                        kept_rows,
                        some < n,
                        counts,
                        candidates,
                        rank_scale,
                        first_of(kept_rows, firsts) + n_latents,
                        k,
                        CAPACITY,
                        LENGTH,
                        BY_MAGNITUDE,
                    )
                    tl.store(counts + kept_rows, n_kept, mask=some < n)
                    tl.store(thresholds + kept_rows, last, mask=(some < n) & (n_kept >= k))
                tl.debug_barrier()
        for part in tl.range(first, tl.minimum(first + ROWS, n), KEPT):
            some = part + tl.arange(0, KEPT)
            rows_done = tl.load(overflowed + some, mask=some < n, other=0)
            token = token_of(rows_done, tokens, B)
            outputs = (values, indices)
            own_lists = (rows_done, token, some < n, candidates, rank_scale)
            write_selected(*own_lists, *outputs, k, CAPACITY, BEST, STEP, BY_MAGNITUDE)
