"""decode_residual on the host kernels: decode's kernel in its fused form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives.decode import cpu as decode

if TYPE_CHECKING:
    import torch


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    drop_zeros: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/decode.cpp with a target."""
    e = values.new_empty((values.shape[0], W.shape[1]))
    sse = values.new_empty((values.shape[0],))
    grad = values.new_empty(values.shape)
    decode.launch(values, indices, W, b_dec, None, target, e, sse, grad, drop_zeros)
    return e, sse, grad
