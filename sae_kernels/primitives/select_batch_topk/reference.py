"""select_batch_topk in plain torch: the specification, by sorting all positive scores."""

from __future__ import annotations

import torch

from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.select_threshold import reference as select_threshold


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    count: int,
    rank_scale: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorts the keys; a stable sort keeps equal ones in the order of tokens and latents."""
    bounds = x.new_zeros(W.shape[0], dtype=accumulator(x.dtype))
    values, indices, offsets = select_threshold.run(x, W, b, bounds)
    key = values if rank_scale is None else values * rank_scale[indices.long()]
    possible = (~(key <= 0)).nonzero()[:, 0]
    order = key[possible].sort(descending=True, stable=True).indices[:count]
    kept = possible[order].sort().values
    counts = torch.zeros_like(values, dtype=torch.int32).index_fill_(0, kept, 1).cumsum(0)
    before = torch.nn.functional.pad(counts, (1, 0)).to(torch.int32)
    return values[kept], indices[kept], before[offsets.long()]
