"""select_topk_routed in plain torch: the specification, one expert after the other."""

from __future__ import annotations

import itertools

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.select_topk import reference


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    narrow: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects for one expert after the other by the reference of the plain selection."""
    checks.routes(tokens, starts)
    values = x.new_empty((x.shape[0], k), dtype=checks.accumulator(x.dtype))
    indices = x.new_empty((x.shape[0], k), dtype=torch.int32)
    ends = starts.tolist()
    width = W.shape[0] // (len(ends) - 1)
    for e, (start, end) in enumerate(itertools.pairwise(ends)):
        own, latents = tokens[start:end].long(), slice(e * width, (e + 1) * width)
        bias = None if b is None else b[latents]
        values[own], local = reference.run(x[own], W[latents], bias, k, None)
        indices[own] = local + e * width
    return values, indices
