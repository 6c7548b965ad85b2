"""row_sqnorm: the squared norm of each gradient row, after projection, without the gradient.

The extra pass that clipping by the global norm costs: ``out[f] = |g_f|^2`` with g as
:mod:`~sae_kernels.primitives.row_update` has it before clipping.
"""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator
from sae_kernels.primitives.row_update import arithmetic_dtype, check_high, check_norm
from sae_kernels.primitives.terms import SCHEMA, Gradient


def _check(param: torch.Tensor, high: torch.Tensor | None, *arguments: Any) -> None:
    *columns, norm, slices = arguments
    checks.shape("param", param, ["F", "width"], "latents first")
    checks.dtype("param", param, (torch.float32, torch.float64, torch.int16))
    checks.shape("high", high, list(param.shape), "like param")
    if param.dtype == torch.int16:
        check_high(high, "high")
    elif high is not None:
        checks.dtype("param with high halves", param, (torch.int16,))
    checks.same_device(param=param, high=high)
    check_norm(norm, slices, param.shape[1])
    gradient = Gradient.from_columns(*columns)
    gradient.check(param.shape[0], param.shape[1], arithmetic_dtype(param))


_operator = Operator(
    f"row_sqnorm(Tensor param, Tensor? high, {SCHEMA}, str norm, int slices, str backend)"
    " -> Tensor",
    _check,
    lambda param, *_: param.new_empty(param.shape[0], dtype=arithmetic_dtype(param)),
)


def row_sqnorm(
    param: torch.Tensor,
    gradient: Gradient,
    *,
    high: torch.Tensor | None = None,
    norm: str = "none",
    slices: int = 1,
    backend: str | None = None,
) -> torch.Tensor:
    """The squared gradient norm of every row, [F]; ``high`` goes with int16 low halves."""
    result: torch.Tensor = _operator(
        param, high, *gradient.columns(), norm, slices, backend=backend
    )
    return result
