"""row_update: gather a row's gradient, project, clip, Adam, renormalise, copy; one visit per row.

For every row w of an [F, width] matrix with gradient g (never written to memory):

1. with ``norm="unit"``: ``g -= <g, w> w``, the part that renormalising would undo;
2. ``g *= clip_scale``;
3. Adam (Kingma & Ba, arXiv 1412.6980): ``m = beta1 m + (1 - beta1) g``,
   ``v = beta2 v + (1 - beta2) g^2``,
   ``w -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``;
4. ``norm="unit"``: ``w /= |w|``; ``"at_most_one"``: only where ``|w| > 1``. A zero row stays.

Projection and norm apply to each of ``slices`` equal parts of a row by itself (a crosscoder's
layers). A per-latent vector is a matrix of width 1. ``lazy`` leaves rows without any gradient
entry untouched (their m and v too), as torch.optim.SparseAdam does; the default is dense Adam.

Two layouts beside fp32 save memory; the arithmetic stays fp32 in both:

- **bf16 moments**, rounded stochastically: 16 random bits are added below the last bit that is
  kept, and what is left is cut off, so that the expectation is exact. Under nearest rounding v
  would never decay: ``beta2 = 0.999`` changes it by less than half a bf16 ulp. The bits are a hash
  of (step, latent, column): every run and every backend draws the same. NaN and infinities stay;
  beyond the largest finite bf16 a value may round to infinity, as under nearest rounding.
- **a split master**: ``param`` holds the low int16 halves and ``copy`` the high bf16 halves, see
  :mod:`~sae_kernels.primitives.row_update.halves`. Bitwise the same training as with an fp32
  master, without memory for a separate copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator
from sae_kernels.primitives.terms import SCHEMA, Gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

NORMS = ("none", "unit", "at_most_one")
HYPER = ("lr", "clip_scale", "bias_correction1", "bias_correction2", "skip", "step")


class AdamRow(NamedTuple):
    """A matrix with its Adam state and the compute copy that follows it.

    Attributes:
        param: fp32 or fp64 [F, width], or the int16 low halves of an fp32 matrix.
        m, v: both like ``param`` (fp32 beside halves), or both bf16 beside any but fp64.
        copy: bf16 or fp16 [F, width] beside an fp32 ``param``, rewritten from it; the bf16 high
            halves beside low ones; or None.
    """

    param: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    copy: torch.Tensor | None = None


def _check(
    param: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    copy: torch.Tensor | None,
    *arguments: Any,
) -> None:
    *columns, hyper, _beta1, _beta2, _eps, norm, slices, _lazy = arguments
    checks.shape("param", param, ["F", "width"], "latents first")
    for name, tensor in (("m", m), ("v", v), ("copy", copy)):
        checks.shape(name, tensor, list(param.shape), "like param")
    _check_dtypes(param, m, v, copy)
    checks.shape("hyper", hyper, [len(HYPER)], ", ".join(HYPER))
    checks.dtype("hyper", hyper, (torch.float64,))
    check_norm(norm, slices, param.shape[1])
    gradient = Gradient.from_columns(*columns)
    gradient.check(param.shape[0], param.shape[1], arithmetic_dtype(param))
    part = gradient.terms[0].coef if gradient.terms else gradient.dense
    checks.same_device(param=param, m=m, v=v, copy=copy, hyper=hyper, gradient=part)
    for name, tensor in (("param", param), ("m", m), ("v", v), ("copy", copy)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor to update in place")


def _check_dtypes(
    param: torch.Tensor, m: torch.Tensor, v: torch.Tensor, copy: torch.Tensor | None
) -> None:
    checks.dtype("param", param, (torch.float32, torch.float64, torch.int16))
    high = arithmetic_dtype(param)
    states = (high,) if high == torch.float64 else (high, torch.bfloat16)
    checks.dtype("m", m, states)
    checks.dtype("v", v, states)
    checks.dtype("v beside such an m", v, (m.dtype,))
    if param.dtype == torch.int16:
        check_high(copy, "copy")
        return
    checks.dtype("copy", copy, (torch.bfloat16, torch.float16))
    if copy is not None:
        checks.dtype("param with a copy", param, (torch.float32,))


def check_high(high: torch.Tensor | None, name: str) -> None:
    """Raises ValueError or TypeError unless there are high halves to go with low ones."""
    if high is None:
        raise ValueError(
            f"{name}: expected the bfloat16 high halves that go with an int16 param, got None; "
            "halves.split() makes both"
        )
    checks.dtype(f"{name} beside an int16 param", high, (torch.bfloat16,))


def arithmetic_dtype(param: torch.Tensor) -> torch.dtype:
    """The dtype in which a row is updated: its own, fp32 for the halves of one."""
    return torch.float32 if param.dtype == torch.int16 else param.dtype


def check_norm(norm: str, slices: int, width: int) -> None:
    """Raises ValueError for an unknown norm policy or slices that do not divide the width."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if slices < 1 or width % slices:
        raise ValueError(f"slices: expected a divisor of the width {width}, got {slices}")


_operator = Operator(
    "row_update(Tensor(a!) param, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? copy,"
    f" {SCHEMA}, Tensor hyper, float beta1, float beta2, float eps, str norm, int slices,"
    " bool lazy, str backend) -> ()",
    _check,
    lambda *_: None,
)


def row_update(
    row: AdamRow,
    gradient: Gradient,
    hyper: torch.Tensor,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    norm: str = "none",
    slices: int = 1,
    lazy: bool = False,
    backend: str | None = None,
) -> None:
    """Updates ``row`` in place.

    Args:
        row: the matrix, its state and its compute copy.
        gradient: the gradient in parts.
        hyper: fp64 [6] on the device: lr, clip scale, 1 - beta1^t, 1 - beta2^t, a skip flag
            (non-zero: nothing is changed) and t, which only counts for stochastic rounding. A
            tensor, so that no step waits for the host.
        betas, eps: of Adam.
        norm: "none", "unit" or "at_most_one".
        slices: equal parts of a row to which the norm applies by itself.
        lazy: leave rows without a gradient entry as they are.
        backend: see :mod:`sae_kernels.backends`.
    """
    _operator(*row, *gradient.columns(), hyper, *betas, eps, norm, slices, lazy, backend=backend)
