"""select_threshold in plain torch: the specification, a few rows of scores at a time."""

from __future__ import annotations

import torch

from sae_kernels.primitives.checks import accumulator

_SCORES_AT_ONCE = 1 << 22


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    bounds: torch.Tensor,
    narrow: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compares all scores of a row; waits for the device, which alone knows how many pass."""
    dtype = accumulator(x.dtype)
    W = W.to(dtype)
    values, indices, counts = [], [], []
    rows = max(1, _SCORES_AT_ONCE // max(1, W.shape[0]))
    for part in x.split(rows):
        h = part.to(dtype) @ W.T
        if b is not None:
            h = h + b
        h = h + 0.0  # -0 becomes +0
        kept = ~(h <= bounds)
        values.append(h[kept])
        indices.append(kept.nonzero()[:, 1].to(torch.int32))
        counts.append(kept.sum(1))
    offsets = x.new_zeros(x.shape[0] + 1, dtype=torch.int32)
    offsets[1:] = torch.cat(counts).cumsum(0)
    return torch.cat(values), torch.cat(indices), offsets
