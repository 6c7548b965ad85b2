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
    squares, e = e.square().sum(-1), summed_up(e, group_ends, group_weights)
    grad = code_grad.run(e, indices, W, group_ends, offsets)
    return e, squares, torch.where(values == 0, 0, grad) if drop_zeros else grad


def summed_up(
    e: torch.Tensor, group_ends: torch.Tensor | None, group_weights: torch.Tensor | None
) -> torch.Tensor:
    """The residuals as the gradients of the codes read them.

    With groups a latent's is the weighted sum of the residuals of its prefix and all longer ones.
    """
    if group_weights is not None:
        e = e * group_weights[:, None, None]
    return e if group_ends is None else e.flip(0).cumsum(0).flip(0)
