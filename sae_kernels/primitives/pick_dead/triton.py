"""pick_dead in Triton: the age that the last place goes to is found by bisection.

With few latents one block does everything and goes through the counters once a step. Beyond
that each chunk of them is sorted first, on its own multiprocessor, so that a step asks one lane a
chunk for a place in its list; a last launch writes the latents, at places known by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_kernels import gpu

_ONE_BLOCK = 16384  # latents for which one launch is faster than three (docs/gpu.md)
_BLOCK, _WARPS = 8192, 16
_CHUNK, _CHUNK_WARPS = 1024, 4  # of longer chunks a warp sorts as much
_MOST_CHUNKS = 4096  # beyond which chunks are longer: the lanes' registers
_LANES = 128  # chunks that a warp searches


@triton.jit
def _write(latents, place, f, age, cut, ties):
    """All that are older than cut, and the first of that age; how many are written and tied."""
    tie = (age == cut).to(tl.int32)
    chosen = ((age > cut) | ((tie > 0) & (tl.cumsum(tie) <= ties))).to(tl.int32)
    tl.store(latents + place + tl.cumsum(chosen) - 1, f, mask=chosen > 0)
    return tl.sum(chosen), tl.sum(tie)


@triton.jit
def _count(since_fired, F, threshold, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, F, BLOCK):
        f = start + lane
        found += (tl.load(since_fired + f, mask=f < F, other=-1) >= threshold).to(tl.int32)
    return tl.sum(found)


@triton.jit
def _pick_dead(since_fired, latents, count, F, after, at_most, BLOCK: tl.constexpr):
    # Most of the time nothing is dead, and then one pass over the counters is all.
    lane = tl.arange(0, BLOCK)
    for start in range(0, at_most, BLOCK):
        tl.store(latents + start + lane, -1, mask=start + lane < at_most)
    n_dead = _count(since_fired, F, after, BLOCK)
    tl.store(count, tl.minimum(n_dead, at_most))
    if n_dead == 0:
        return
    tl.debug_barrier()  # the padding comes first, from whichever thread
    low = after + tl.zeros(
        (), tl.int64
    )  # at least at_most latents are this old, if so many are dead
    if n_dead > at_most:
        oldest = tl.full((BLOCK,), 0, tl.int64)
        for start in range(0, F, BLOCK):
            f = start + lane
            oldest = tl.maximum(oldest, tl.load(since_fired + f, mask=f < F, other=0))
        high = tl.max(oldest) + 1
        while high - low > 1:
            middle = low + (high - low) // 2
            if _count(since_fired, F, middle, BLOCK) >= at_most:
                low = middle
            else:
                high = middle
    ties = at_most - _count(since_fired, F, low + 1, BLOCK)
    place = 0
    for start in range(0, F, BLOCK):
        f = start + lane
        age = tl.load(since_fired + f, mask=f < F, other=-1)
        written, tied = _write(latents, place, f, age, low, ties)
        place += written
        ties -= tied


@triton.jit
def _sort_chunks(since_fired, ages, n_dead, F, after, CHUNK: tl.constexpr):
    # A chunk's dead and their number; most of the time there are none, and nothing is sorted.
    chunk = tl.program_id(0)
    f = chunk * CHUNK + tl.arange(0, CHUNK)
    age = tl.load(since_fired + f, mask=f < F, other=-1)
    dead = tl.sum((age >= after).to(tl.int32))
    tl.store(n_dead + chunk, dead)
    if dead > 0:
        tl.store(ages + f, tl.sort(age, descending=True))


@triton.jit
def _divide(
    ages, n_dead, places, ties, cut, count, n_chunks, after, at_most,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # The age beyond which all are taken, and of each chunk where its latents are written and how
    # many of that age are taken from it. A lane has one chunk; `older` and `old` of its latents
    # are at least `high` and `low` tokens old.
    chunk = tl.arange(0, CHUNKS)
    old = tl.load(n_dead + chunk, mask=chunk < n_chunks, other=0)
    total = tl.sum(old)
    tl.store(count, tl.minimum(total, at_most))
    high = after + tl.zeros((), tl.int64)
    low = high - 1
    older = old
    if total > at_most:
        low = high
        high = tl.max(tl.load(ages + chunk * CHUNK, mask=old > 0, other=0)) + 1
        older = tl.zeros_like(old)
    while high - low > 1:
        middle = low + (high - low) // 2
        begin, end = older, old
        while tl.max(end - begin) > 0:
            at = (begin + end) // 2
            within = tl.load(ages + chunk * CHUNK + at, mask=begin < end, other=0) >= middle
            begin, end = tl.where(within, at + 1, begin), tl.where(within, end, at)
        if tl.sum(begin) >= at_most:
            low, old = middle, begin
        else:
            high, older = middle, begin
    tied = old - older
    left = at_most - tl.sum(older) - (tl.cumsum(tied) - tied)
    tied = tl.maximum(tl.minimum(tied, left), 0)
    chosen = older + tied
    tl.store(cut, low)
    tl.store(ties + chunk, tied, mask=chunk < n_chunks)
    tl.store(places + chunk, tl.cumsum(chosen) - chosen, mask=chunk < n_chunks)


@triton.jit
def _write_chunks(since_fired, places, ties, cut, count, latents, F, at_most, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    f = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(latents + f, -1, mask=(f >= tl.load(count)) & (f < at_most))
    age = tl.load(since_fired + f, mask=f < F, other=-1)
    _write(latents, tl.load(places + chunk), f, age, tl.load(cut), tl.load(ties + chunk))


def run(since_fired: torch.Tensor, after: int, at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches one kernel, or three where there are many latents; the host does not wait."""
    since_fired = since_fired.contiguous()
    n_latents, device = since_fired.shape[0], since_fired.device
    at_most = min(at_most, n_latents)
    latents = torch.empty(at_most, dtype=torch.int32, device=device)
    if not at_most:
        return latents, torch.zeros((), dtype=torch.int32, device=device)
    count = torch.empty((), dtype=torch.int32, device=device)
    if n_latents <= _ONE_BLOCK:
        _pick_dead[(1,)](
            since_fired, latents, count, n_latents, after, at_most, BLOCK=_BLOCK, num_warps=_WARPS
        )
        return latents, count
    chunk = max(_CHUNK, gpu.next_power_of_two(-(-n_latents // _MOST_CHUNKS)))
    n_chunks = -(-n_latents // chunk)
    lanes = gpu.next_power_of_two(n_chunks)
    warps = min(chunk // _CHUNK * _CHUNK_WARPS, 16)
    ages = torch.empty(n_chunks * chunk, dtype=torch.int64, device=device)
    cut = torch.empty((), dtype=torch.int64, device=device)
    n_dead, places, ties = torch.empty(3, n_chunks, dtype=torch.int32, device=device)
    _sort_chunks[(n_chunks,)](
        since_fired, ages, n_dead, n_latents, after, CHUNK=chunk, num_warps=warps
    )
    _divide[(1,)](
        ages, n_dead, places, ties, cut, count, n_chunks, after, at_most,
        CHUNK=chunk, CHUNKS=lanes, num_warps=min(max(lanes // _LANES, 1), 16),
    )  # fmt: skip
    _write_chunks[(n_chunks,)](
        since_fired, places, ties, cut, count, latents, n_latents, at_most,
        CHUNK=chunk, num_warps=warps,
    )  # fmt: skip
    return latents, count
