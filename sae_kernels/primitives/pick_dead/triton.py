"""pick_dead in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK, _WARPS = 8192, 16


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
    # One block: most of the time nothing is dead, and then one pass over the counters is all. With
    # more dead than places, the age that the last place goes to is found by bisection.
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
    # All that are older than that age, and the first latents of that age.
    ties = at_most - _count(since_fired, F, low + 1, BLOCK)
    place = 0
    tied = 0
    for start in range(0, F, BLOCK):
        f = start + lane
        age = tl.load(since_fired + f, mask=f < F, other=-1)
        tie = (age == low).to(tl.int32)
        first_ties = tied + tl.cumsum(tie) <= ties
        chosen = ((age > low) | ((tie > 0) & first_ties)).to(tl.int32)
        tl.store(latents + place + tl.cumsum(chosen) - 1, f, mask=chosen > 0)
        place += tl.sum(chosen)
        tied += tl.sum(tie)


def run(since_fired: torch.Tensor, after: int, at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel on one multiprocessor."""
    since_fired = since_fired.contiguous()
    n_latents = since_fired.shape[0]
    at_most = min(at_most, n_latents)
    latents = torch.empty(at_most, dtype=torch.int32, device=since_fired.device)
    count = torch.zeros((), dtype=torch.int32, device=since_fired.device)
    if at_most:
        _pick_dead[(1,)](
            since_fired,
            latents,
            count,
            n_latents,
            after,
            at_most,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return latents, count
