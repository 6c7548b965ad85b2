"""row_sqnorm in plain torch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.primitives.row_update.reference import gather, projected, whole
from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    import torch


def run(param: torch.Tensor, high: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
    """Squared norms of the dense gradient's rows."""
    *columns, norm, slices = arguments
    param = whole(param, high)
    grad, _ = gather(param, Gradient.from_columns(*columns))
    if norm == "unit":
        grad = projected(param, grad, slices)
    return grad.square().sum(1)
