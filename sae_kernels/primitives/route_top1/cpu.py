"""route_top1 on the host kernels."""

from __future__ import annotations

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.tensors import packed


def run(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/route_top1.cpp."""
    operands = [packed(t) for t in (x, W, b)]
    experts = x.new_empty(x.shape[0], dtype=torch.int32)
    probabilities = x.new_empty((x.shape[0], W.shape[0]), dtype=accumulator(x.dtype))
    results, sizes = (experts, probabilities), (*x.shape, W.shape[0])
    cpu.run_with_workspace("route_top1", cpu.code(x.dtype), *operands, *results, *sizes)
    return experts, probabilities
