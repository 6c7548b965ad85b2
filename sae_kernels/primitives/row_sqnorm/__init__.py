"""The squared norm of every gradient row, without the gradient: what clipping by norm needs."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result
from sae_kernels.primitives.rows import arithmetic_dtype, check_high, check_norm
from sae_kernels.primitives.terms import Gradient


@primitive(decided_by="param")
def row_sqnorm(
    param: torch.Tensor,
    gradient: Gradient,
    *,
    high: torch.Tensor | None = None,
    norm: str = "none",
    slices: int = 1,
    backend: str | None = None,
) -> torch.Tensor:
    """Computes ``|g_f|^2`` of every row's gradient after projection, as clipping needs it.

    Args:
        param: the matrix [F, width], fp32 or fp64, or the int16 low halves of an fp32 one.
        gradient: its gradient in parts.
        high: the bf16 high halves that go with int16 low ones, else None.
        norm: "none", "unit" or "at_most_one"; "unit" projects each row's gradient.
        slices: equal parts of a row to which the norm applies by itself.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Squared norms [F] in the dtype of the arithmetic: fp32 for halves, else param's own.
    """
    checks.shape("param", param, ["F", "width"], "latents first")
    checks.dtype("param", param, (torch.float32, torch.float64, torch.int16))
    checks.shape("high", high, list(param.shape), "like param")
    if param.dtype == torch.int16:
        check_high(high, "high")
    elif high is not None:
        checks.dtype("param with high halves", param, (torch.int16,))
    checks.same_device(param=param, high=high)
    check_norm(norm, slices, param.shape[1])
    dtype = arithmetic_dtype(param)
    gradient.check(param.shape[0], param.shape[1], dtype)
    return result([param.shape[0]], dtype)
