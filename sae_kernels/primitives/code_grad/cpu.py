"""code_grad on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.backends import cpu

if TYPE_CHECKING:
    import torch


def run(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
) -> torch.Tensor:
    """Runs csrc/cpu/decode.cpp."""
    out = grad.new_empty(indices.shape)
    alive = [
        None if t is None else cpu.packed(t) for t in (grad, indices, W, group_ends, out)
    ]
    (B, K), (F, D) = indices.shape, W.shape
    groups = 1 if group_ends is None else group_ends.shape[0]
    in_range = cpu.module().code_grad(
        cpu.isa(),
        cpu.code(W.dtype),
        *(cpu.address(t) for t in alive),
        B,
        K,
        D,
        F,
        groups,
        cpu.threads(),
    )
    cpu.check_indices(in_range, indices, F)
    return out
