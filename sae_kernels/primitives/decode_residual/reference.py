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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual, squared error per token, and the residual's products with the selected rows."""
    e = decode.run(values, indices, W, b_dec, None) - target
    grad = code_grad.run(e, indices, W, None)
    if drop_zeros:
        grad = torch.where(values == 0, 0, grad)
    return e, e.square().sum(1), grad
