"""decode on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.tensors import packed

if TYPE_CHECKING:
    import torch


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
) -> torch.Tensor:
    """Runs csrc/cpu/decode.cpp."""
    checks.groups_split_latents(group_ends, W.shape[0])
    groups = 1 if group_ends is None else group_ends.shape[0]
    out = values.new_empty((groups, values.shape[0], W.shape[1]))
    launch(values, indices, W, b_dec, group_ends, None, out, None, None, False)
    return out[0] if group_ends is None else out


def launch(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    target: torch.Tensor | None,
    out: torch.Tensor,
    sse: torch.Tensor | None,
    code_grad: torch.Tensor | None,
    drop_zeros: bool,
) -> None:
    """Calls the kernel in its plain form, or in its fused form when there is a target."""
    alive = [
        packed(t) for t in (values, indices, W, b_dec, group_ends, target, out, sse, code_grad)
    ]
    (B, K), (F, D) = values.shape, W.shape
    groups = 1 if group_ends is None else group_ends.shape[0]
    in_range = cpu.module().decode(
        cpu.isa(),
        cpu.code(W.dtype),
        *(cpu.address(t) for t in alive),
        B,
        K,
        D,
        F,
        groups,
        drop_zeros,
        cpu.threads(),
    )
    if not in_range:
        checks.latents_in_range(indices, F)
