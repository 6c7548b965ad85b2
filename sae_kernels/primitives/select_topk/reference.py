"""select_topk in plain torch: the specification, a few rows of scores at a time."""

from __future__ import annotations

import torch

from sae_kernels.primitives.checks import accumulator

_SCORES_AT_ONCE = 1 << 22


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    narrow: torch.Tensor | None = None,
    by_magnitude: bool = False,
    floor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts all scores of a row; a stable sort keeps equal keys in latent order."""
    dtype = accumulator(x.dtype)
    values = x.new_empty((x.shape[0], k), dtype=dtype)
    indices = x.new_empty((x.shape[0], k), dtype=torch.int32)
    W = W.to(dtype)
    rows = max(1, _SCORES_AT_ONCE // max(1, W.shape[0]))
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        h = x[part].to(dtype) @ W.T
        if b is not None:
            h = h + b
        h = h + 0.0  # -0 becomes +0
        key = h if rank_scale is None else h * rank_scale + 0.0
        key = key.abs() if by_magnitude else key
        order = key.sort(dim=1, descending=True, stable=True).indices[:, :k]
        values[part] = h.gather(1, order)
        indices[part] = order.to(torch.int32)
    return values, indices
