"""row_sqnorm: the squared norm of each gradient row, after projection, without the gradient.

The extra pass that clipping by the global norm costs: ``out[f] = |g_f|^2`` with g as
:mod:`~sae_kernels.primitives.row_update` has it before clipping.
"""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator
from sae_kernels.primitives.row_update import check_norm
from sae_kernels.primitives.terms import SCHEMA, Gradient


def _check(param: torch.Tensor, *arguments: Any) -> None:
    *columns, norm, slices = arguments
    checks.shape("param", param, ["F", "width"], "latents first")
    checks.dtype("param", param, (torch.float32, torch.float64))
    check_norm(norm, slices, param.shape[1])
    Gradient.from_columns(*columns).check(param.shape[0], param.shape[1], param.dtype)


_operator = Operator(
    f"row_sqnorm(Tensor param, {SCHEMA}, str norm, int slices, str backend) -> Tensor",
    _check,
    lambda param, *_: param.new_empty(param.shape[0]),
)


def row_sqnorm(
    param: torch.Tensor,
    gradient: Gradient,
    *,
    norm: str = "none",
    slices: int = 1,
    backend: str | None = None,
) -> torch.Tensor:
    """The squared gradient norm of every row, [F]."""
    result: torch.Tensor = _operator(param, *gradient.columns(), norm, slices, backend=backend)
    return result
