"""decode_residual in plain torch: the specification, by way of decode and code_grad."""

from __future__ import annotations

import torch

from sae_kernels.primitives.code_grad import reference as code_grad
from sae_kernels.primitives.decode import reference as decode


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    drop_zeros: bool,
    group_ends: torch.Tensor | None = None,
    group_weights: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    blocks: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decodes, subtracts, squares and multiplies the residual with the selected rows."""
    e = decode.run(values, indices, W, b_dec, group_ends, offsets, blocks) - target
    sse = e.square().sum(-1)
    if group_weights is not None:
        e = e * group_weights[:, None, None]
    if group_ends is not None:
        e = e.flip(0).cumsum(0).flip(0)
    grad = code_grad.run(e, indices, W, group_ends, offsets)
    if drop_zeros:
        grad = torch.where(values == 0, 0, grad)
    return e, sse, grad
