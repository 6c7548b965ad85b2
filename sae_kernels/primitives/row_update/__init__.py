"""Adam on the rows of a matrix, straight from the parts of its gradient, in one visit per row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive
from sae_kernels.primitives.rows import HYPER, arithmetic_dtype, check_high, check_norm
from sae_kernels.primitives.terms import Gradient


class AdamMatrix(NamedTuple):
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


@primitive(writes=("param", "m", "v", "copy"))
def row_update(
    matrix: AdamMatrix,
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
    """Updates every row in place: project, clip, Adam, renormalise, copy.

    For every row w of an [F, width] matrix with gradient g (never written to memory):

    1. with ``norm="unit"``: ``g -= <g, w> w``, the part that renormalising would undo;
    2. ``g *= clip_scale``;
    3. Adam (Kingma & Ba, arXiv 1412.6980): ``m = beta1 m + (1 - beta1) g``,
       ``v = beta2 v + (1 - beta2) g^2``,
       ``w -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``;
    4. ``norm="unit"``: ``w /= |w|``; ``"at_most_one"``: only where ``|w| > 1``. A zero row stays.

    A per-latent vector is a matrix of width 1.

    Two layouts beside fp32 save memory; the arithmetic stays fp32 in both:

    - **bf16 moments**, rounded stochastically: 16 random bits are added below the last bit that is
      kept, and what is left is cut off, so that the expectation is exact. Under nearest rounding v
      would never decay: ``beta2 = 0.999`` changes it by less than half a bf16 ulp. The bits are a
      hash of (step, latent, column): every run and every backend draws the same. NaN and infinities
      stay; beyond the largest finite bf16 a value may round to infinity, as under nearest rounding.
    - **a split master**: ``param`` holds the low int16 halves and ``copy`` the high bf16 halves,
      see :mod:`~sae_kernels.primitives.row_update.halves`. Bitwise the same training as with an
      fp32 master, without memory for a separate copy.

    Args:
        matrix: the matrix, its state and its compute copy.
        gradient: the gradient in parts.
        hyper: fp64 [6] on the device: lr, clip scale, 1 - beta1^t, 1 - beta2^t, a skip flag
            (non-zero: nothing is changed) and t, which only counts for stochastic rounding. A
            tensor, so that no step waits for the host.
        betas, eps: of Adam.
        norm: "none", "unit" or "at_most_one".
        slices: equal parts of a row to which projection and norm apply by themselves (a
            crosscoder's layers).
        lazy: leave rows without any gradient entry as they are (their m and v too), as
            torch.optim.SparseAdam does.
        backend: see :mod:`sae_kernels.backends`.
    """
    param, parts = matrix.param, matrix._asdict()
    checks.shape("param", param, ["F", "width"], "latents first")
    for name, tensor in parts.items():
        checks.shape(name, tensor, list(param.shape), "like param")
    _check_dtypes(*matrix)
    checks.shape("hyper", hyper, [len(HYPER)], ", ".join(HYPER))
    checks.dtype("hyper", hyper, (torch.float64,))
    check_norm(norm, slices, param.shape[1])
    gradient.check(param.shape[0], param.shape[1], arithmetic_dtype(param))
    some = gradient.terms[0].coef if gradient.terms else gradient.dense
    checks.same_device(**parts, hyper=hyper, gradient=some)
    for name, tensor in parts.items():
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
