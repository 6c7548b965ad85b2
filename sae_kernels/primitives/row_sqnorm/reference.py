"""row_sqnorm in plain torch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives.row_update.reference import gather, projected, whole

if TYPE_CHECKING:
    import torch

    from sae_kernels.primitives.terms import Gradient


def run(
    param: torch.Tensor, gradient: Gradient, high: torch.Tensor | None, norm: str, slices: int
) -> torch.Tensor:
    """Squared norms of the dense gradient's rows."""
    param = whole(param, high)
    grad, _ = gather(param, gradient)
    if norm == "unit":
        grad = projected(param, grad, slices)
    return grad.square().sum(1)
