"""select_threshold of a few tokens in Triton: W is read once, and scores are kept until counted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.few_tokens import score

_RUNS = 256 if gpu.interpreted() else 16  # tiles of a token that a block looks through at a time


def select(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, bounds: torch.Tensor, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and counts, waits for the number of entries and stores them in order."""
    h, counts = score(x, W, b, tile, bounds=bounds)
    (B, F), n_tiles = h.shape, counts.shape[1]
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    n = int(ends[-1])
    values = x.new_empty(n, dtype=torch.float32)
    indices = x.new_empty(n, dtype=torch.int32)
    _put[(-(-ends.shape[0] // _RUNS),)](
        h, bounds, ends, values, indices, ends.shape[0], F, n_tiles,
        RUNS=_RUNS, TILE=tile, num_warps=4,
    )  # fmt: skip
    offsets = x.new_zeros(B + 1, dtype=torch.int32)
    offsets[1:] = ends[n_tiles - 1 :: n_tiles]
    return values, indices, offsets


@triton.jit
def _put(
    scores,
    bounds,
    ends,
    values,
    indices,
    n_runs,
    F,
    n_tiles,
    RUNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Stores the scores above their bounds that lie in some runs, a token's of one tile each."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)[:, None]
    latent = run % n_tiles * TILE + tl.arange(0, TILE)[None, :]
    there = (run < n_runs) & (latent < F)
    h = tl.load(scores + (run // n_tiles * F + latent), mask=there, other=0.0)
    bound = tl.load(bounds + latent, mask=there, other=0.0)
    above = (there & ~(h <= bound)).to(tl.int32)
    end = tl.load(ends + run, mask=run < n_runs, other=0)
    place = end - tl.sum(above, 1)[:, None] + tl.cumsum(above, 1) - 1
    tl.store(values + place, h, mask=above != 0)
    tl.store(indices + place, latent, mask=above != 0)
