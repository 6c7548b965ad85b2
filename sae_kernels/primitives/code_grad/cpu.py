"""code_grad on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    import torch


def run(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs csrc/cpu/decode.cpp."""
    checks.offsets_split_entries(offsets, indices.numel())
    checks.groups_split_latents(group_ends, W.shape[0])
    out = grad.new_empty(indices.shape)
    operands = [packed(t) for t in (grad, indices, offsets, W, group_ends, out)]
    in_range = cpu.run(
        "code_grad",
        cpu.code(W.dtype),
        *operands,
        checks.n_tokens(indices, offsets),
        1 if offsets is not None else indices.shape[1],
        W.shape[1],
        W.shape[0],
        1 if group_ends is None else group_ends.shape[0],
    )
    if not in_range:
        checks.latents_in_range(indices, W.shape[0])
    return out
