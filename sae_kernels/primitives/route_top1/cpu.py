"""route_top1 on the host kernels."""

from __future__ import annotations

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives.checks import accumulator
from sae_kernels.tensors import packed


def run(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/route_top1.cpp."""
    x, W, b = packed(x), packed(W), packed(b)
    sizes = (x.shape[0], x.shape[1], W.shape[0])
    experts = x.new_empty(x.shape[0], dtype=torch.int32)
    probabilities = x.new_empty((x.shape[0], W.shape[0]), dtype=accumulator(x.dtype))
    isa, code, threads = cpu.isa(), cpu.code(x.dtype), cpu.threads()
    bytes_needed = cpu.module().route_top1_workspace(isa, code, *sizes, threads)
    workspace = torch.empty(bytes_needed, dtype=torch.uint8)
    cpu.module().route_top1(
        isa,
        code,
        cpu.address(x),
        cpu.address(W),
        cpu.address(b),
        cpu.address(experts),
        cpu.address(probabilities),
        *sizes,
        cpu.address(workspace),
        threads,
    )
    return experts, probabilities
