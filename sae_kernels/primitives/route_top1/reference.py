"""route_top1 in plain torch: the specification."""

from __future__ import annotations

import torch

from sae_kernels.primitives.checks import accumulator


def run(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes torch's argmax: the first NaN, else the first of equal maxima."""
    dtype = accumulator(x.dtype)
    logits = x.to(dtype) @ W.to(dtype).T
    if b is not None:
        logits = logits + b
    return logits.argmax(1).to(torch.int32), logits.softmax(1)
