"""Triton kernels for the lists that hold each token's candidates for its k best latents.

An entry is 64 bits, the latent's number above the fp32 bits of h, and appended in any order. Its
place in the selection is a 64-bit integer too, the ordered bits of its key above the latents
counted from the end: comparing integers then gives (key descending, latent ascending), ties, zeros
and NaN included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from sae_kernels.primitives.products import product

if TYPE_CHECKING:
    import torch

# What a cut of the lists is for, see `keep_best`.
OF_THE_SAMPLE, OF_A_PASS, OF_THE_LAST_PASS, OF_THE_REPEAT = map(tl.constexpr, range(4))
ROWS_A_FLAG = tl.constexpr(128)  # a multiple of every tile's rows
_MOST = tl.constexpr(0x7FFFFFFF)
_FIRST_PLACE, NO_PLACE = tl.constexpr(2**63 - 1), tl.constexpr(-(2**63))


class CandidateLists(NamedTuple):
    """The lists of some rows, padded to whole tiles of rows so that no row needs a mask.

    Attributes:
        counts: int32 [rows], entries let through; more than the capacity: some found no place.
        thresholds: fp32 [rows], the key of the k-th best; NaN: only NaN may win.
        candidates: int64 [rows, capacity], the fp32 bits of h below the latent's number.
    """

    counts: torch.Tensor
    thresholds: torch.Tensor
    candidates: torch.Tensor


class ListRows(NamedTuple):
    """Whose list a row is and which latents it is chosen from; by default row r is token r's.

    Attributes:
        tokens: int32 [rows], the token of each row, -1 of one that only fills its tile.
        firsts: int32 [rows / ROWS_A_FLAG], the first latent of so many rows.
        n_latents: how many latents there are from the first on; default: all.
        n_tokens: how many there are; default: as many as rows.
    """

    tokens: torch.Tensor | None = None
    firsts: torch.Tensor | None = None
    n_latents: int | None = None
    n_tokens: int | None = None


class Overflow(NamedTuple):
    """What is known of lists that overflowed, on the device alone.

    Attributes:
        incomplete: int32 [rows], 1 where an entry found no place.
        pending: int32 [2, rows / ROWS_A_FLAG], whether rows are scored by a pass; the second is for
            the pass that scores rows of incomplete lists again.
        n: int32 [1], rows that are incomplete even then.
        rows: int32 [rows], their numbers.
    """

    incomplete: torch.Tensor
    pending: torch.Tensor
    n: torch.Tensor
    rows: torch.Tensor


@triton.jit
def packed(h, columns):
    """Packs scores h and latents into list entries."""
    bits = h.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return columns.to(tl.int64) << 32 | bits


@triton.jit
def unpacked(entries):
    """Scores h and latents of list entries."""
    return entries.to(tl.int32).to(tl.float32, bitcast=True), (entries >> 32).to(tl.int32)


@triton.jit
def ordered(key):
    """Maps keys to integers of the same order; -0 is +0, and NaN of any payload is above +inf."""
    bits = tl.where(key == 0, 0.0, key).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ _MOST, bits)
    return tl.where(key == key, bits, _MOST)


@triton.jit
def key_of(order):
    """The key whose sortable integer `ordered` gave."""
    return tl.where(order < 0, order ^ _MOST, order).to(tl.float32, bitcast=True)


@triton.jit
def latent_of(place):
    """The latent whose place `places` gave."""
    return place.to(tl.int32) & _MOST ^ _MOST


@triton.jit
def rank_key(h, columns, live, rank_scale, BY_MAGNITUDE: tl.constexpr):
    """What ranks scores h of some latents: h, times its latent's scale or the magnitude of that."""
    if rank_scale is not None:
        h = h * tl.load(rank_scale + columns, mask=live, other=1.0)
    if BY_MAGNITUDE:
        h = tl.abs(h)
    return h


@triton.jit
def places(entries, valid, rank_scale, BY_MAGNITUDE: tl.constexpr):
    """Maps entries to integers in selection order; the first winner's is the largest."""
    h, columns = unpacked(entries)
    key = rank_key(h, columns, valid, rank_scale, BY_MAGNITUDE)
    order = ordered(key).to(tl.int64) << 32 | (columns ^ _MOST).to(tl.int64)
    return tl.where(valid, order, NO_PLACE)


@triton.jit
def token_of(rows, tokens, B):
    """The tokens of rows, see `ListRows`."""
    if tokens is None:
        return tl.where(rows < B, rows, -1)
    else:  # Triton looks at what follows a return, even under a condition that it knows
        return tl.load(tokens + rows)


@triton.jit
def first_of(rows, firsts):
    """The first latents of rows, see `ListRows`."""
    if firsts is None:
        return rows * 0
    else:
        return tl.load(firsts + rows // ROWS_A_FLAG)


@triton.jit
def bias(b, columns, end):
    """The bias of some columns; -inf from the end of the latents on, so that those never win."""
    live = columns < end
    if b is None:
        return tl.where(live, 0.0, float("-inf"))
    else:
        return tl.load(b + columns, mask=live, other=float("-inf"))


@triton.jit
def sample(
    x,
    W,
    b,
    counts,
    thresholds,
    candidates,
    incomplete,
    pending,
    n_overflowed,
    tokens,
    firsts,
    n_latents,
    B,
    F,
    D,
    n_sampled,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Stores the scores of n_sampled columns, spread evenly, as the first entries of the lists.

    All that is kept beside them begins here too: launches to fill memory would cost more.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lives = tl.max((token_of(rows, tokens, B) >= 0).to(tl.int32), 0)
    if tl.program_id(1) == 0:
        tl.store(counts + rows, n_sampled)
        tl.store(thresholds + rows, float("nan"))
        tl.store(incomplete + rows, 0)
        flag = pending + tl.program_id(0)
        tl.store(flag, lives)
        tl.store(flag + tl.num_programs(0), 0)
        tl.store(n_overflowed, 0, mask=tl.program_id(0) == 0)
    D *= lives  # a product of no width for nobody
    slots = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = slots.to(tl.int64) * n_latents // n_sampled
    columns += first_of(tl.program_id(0) * ROWS, firsts)
    columns = tl.where(slots < n_sampled, columns, F).to(tl.int32)
    h = product(x, W, tl.minimum(rows, B - 1), tl.minimum(columns, F - 1), D, DEPTH, WIDEN)
    h += bias(b, columns, F)[None, :]
    lists = candidates + rows.to(tl.int64)[:, None] * CAPACITY
    tl.store(lists + slots[None, :], packed(h, columns[None, :]))


@triton.jit
def last_place(place, live, k):
    """The k-th largest place of each row, found bit by bit from the top.

    Sorting would take more instructions, registers and barriers, and its order is of no use yet.
    """
    last = tl.full((place.shape[0],), NO_PLACE, tl.int64)
    is_open = live
    bit = tl.full((), 63, tl.int64)
    while (bit >= 0) & (tl.sum(is_open.to(tl.int32), 0) > 0):
        trial = last ^ (tl.full((), 1, tl.int64) << bit)
        count = tl.sum((place >= trial[:, None]).to(tl.int32), 1)
        last = tl.where(count >= k, trial, last)
        is_open = is_open & (count != k)
        bit -= 1
    return last


@triton.jit
def keep(
    rows,
    live,
    counts,
    candidates,
    rank_scale,
    end,
    k,
    CAPACITY: tl.constexpr,
    LENGTH: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
):
    """Cuts lists of at most LENGTH entries back to their k best, of latents before the end.

    Returns how many are kept, the key of the last of them and whether entries found no place. Those
    that did are as good as any: the k-th best of them is not above the k-th best of all.
    """
    count = tl.load(counts + rows, mask=live, other=0)
    slots = tl.arange(0, LENGTH)[None, :]
    lists = candidates + rows.to(tl.int64)[:, None] * CAPACITY
    # What lies beyond the count is memory, and not looked at.
    entries = tl.load(lists + slots, mask=live[:, None], other=0)
    _, columns = unpacked(entries)
    # A NaN or an infinity in x can let columns beyond the last latent through.
    valid = (slots < count[:, None]) & (columns < end[:, None])
    place = places(entries, valid, rank_scale, BY_MAGNITUDE)
    wins = (place >= last_place(place, live, k)[:, None]) & valid
    n_wins = tl.sum(wins.to(tl.int32), 1)
    last = tl.min(tl.where(wins, place, _FIRST_PLACE), 1)
    target = tl.cumsum(wins.to(tl.int32), 1) - 1
    tl.debug_barrier()  # other threads' entries are overwritten
    tl.store(lists + target, entries, mask=wins & live[:, None])
    return n_wins, key_of((last >> 32).to(tl.int32)), count > CAPACITY


@triton.jit(do_not_specialize=["purpose"])
def keep_best(
    counts,
    thresholds,
    candidates,
    incomplete,
    pending,
    rank_scale,
    tokens,
    firsts,
    n_latents,
    B,
    k,
    purpose,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
):
    """Cuts the lists of ROWS rows a block back to their k best, which raises their thresholds.

    Of the sample only the thresholds are needed: counts begin anew. After the last pass rows with
    incomplete lists begin anew as well, with the threshold that they have now, for all columns to
    be scored again; to others nothing more is let through. Only the former are cut after that.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = token_of(rows, tokens, B) >= 0
    was_incomplete = tl.load(incomplete + rows, mask=exists, other=0) != 0
    is_last = purpose == OF_THE_LAST_PASS
    live = exists & (was_incomplete | (purpose != OF_THE_REPEAT))
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    end = first_of(rows, firsts) + n_latents
    n, threshold, overflowed = keep(
        rows, live, counts, candidates, rank_scale, end, k, CAPACITY, CAPACITY, BY_MAGNITUDE
    )
    misses = overflowed | (was_incomplete & (purpose != OF_THE_REPEAT))
    again = misses & is_last
    closed = (misses == 0) & is_last
    tl.store(incomplete + rows, misses.to(tl.int32), mask=live)
    tl.store(counts + rows, tl.where(again | (purpose == OF_THE_SAMPLE), 0, n), mask=live)
    threshold = tl.where(closed, float("inf"), threshold)
    tl.store(thresholds + rows, threshold, mask=live & ((n >= k) | closed))
    flags = pending + tl.cdiv(B, ROWS_A_FLAG) + rows // ROWS_A_FLAG
    tl.store(flags, 1, mask=live & again)


@triton.jit
def write_selected(
    rows,
    token,
    live,
    candidates,
    rank_scale,
    values,
    indices,
    k,
    CAPACITY: tl.constexpr,
    BEST: tl.constexpr,
    STEP: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
):
    """Writes the results of lists that were cut back to k, in selection order, to their tokens.

    An entry's rank is the number of entries before it. A sort would have to carry h along, for the
    key does not tell it where it was scaled.
    """
    lists = candidates + rows.to(tl.int64)[:, None] * CAPACITY
    slots = tl.arange(0, BEST)[None, :]
    valid = (slots < k) & live[:, None]
    entries = tl.load(lists + slots, mask=live[:, None], other=0)
    place = places(entries, valid, rank_scale, BY_MAGNITUDE)
    rank = tl.zeros(entries.shape, tl.int32)
    for start in range(0, BEST, STEP):
        some = start + tl.arange(0, STEP)[None, :]
        others = tl.load(lists + some, mask=live[:, None], other=0)
        other = places(others, (some < k) & live[:, None], rank_scale, BY_MAGNITUDE)
        rank += tl.sum((other[:, None, :] > place[:, :, None]).to(tl.int32), 2)
    h, columns = unpacked(entries)
    target = token.to(tl.int64)[:, None] * k + rank
    tl.store(values + target, tl.where(h == 0, 0.0, h), mask=valid)
    tl.store(indices + target, columns, mask=valid)


@triton.jit
def write_complete(
    counts,
    candidates,
    incomplete,
    rank_scale,
    values,
    indices,
    n_overflowed,
    overflowed,
    tokens,
    B,
    k,
    CAPACITY: tl.constexpr,
    BEST: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr,
):
    """Writes the results of complete lists, and the numbers of the rows whose lists are not."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = token_of(rows, tokens, B)
    live = token >= 0
    count = tl.load(counts + rows, mask=live, other=0)
    # Fewer than k: the sample was rounded otherwise than the rest, in a row of all but equal keys.
    complete = (tl.load(incomplete + rows, mask=live, other=0) == 0) & (count >= k)
    place = tl.atomic_add(n_overflowed + rows * 0, 1, mask=live & ~complete, sem="relaxed")
    tl.store(overflowed + place, rows, mask=live & ~complete)
    live = live & complete
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    lists, outputs = (candidates, rank_scale), (values, indices)
    write_selected(rows, token, live, *lists, *outputs, k, CAPACITY, BEST, STEP, BY_MAGNITUDE)
