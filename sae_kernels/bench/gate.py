"""The correctness check: no speed is reported for a wrong result.

A contestant returns its weights, and the codes and reconstruction of the first tokens. They are
checked against the plain formulas in fp64 on those weights:

- the kept latents are the right ones, but for scores that rounding makes equal;
- codes and reconstruction are within a bound of rounding (below);
- where it trains, the encoder moves against the gradient of its squared error. Libraries differ in
  the scale of their losses, in clipping and in optimizers (Adam, sign descent), all of which keep
  the sign of a first step's elements; so it is their signs that count, where they are clear.

A product of n terms whose operands are rounded to unit roundoff u, accumulated in fp32 with its
own u32 and stored with u, is off by at most ``(2 u + n u32) sum |terms| + u |result|``, to first
order (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.errors import SaeKernelsError

if TYPE_CHECKING:
    from sae_kernels.bench.contestants.contestant import Task, Tensors

TOKENS = 64  # of the batch that are judged: the oracle is dense, and in fp64
_U32 = torch.finfo(torch.float32).eps / 2
# Elements of the gradient above its root mean square are clear; of their signs so many must agree
# (not all: kept sets drift as weights do, and momentum remembers the step before).
_AGREE = 0.95


class WrongResult(SaeKernelsError):
    """Raised for a wrong result of a contestant."""


class Deviation(NamedTuple):
    """The error of a result and its bound, relative to the result's largest element.

    Of the reconstruction, or of the codes if there is none.
    """

    error: float
    budget: float


def judge(task: Task, x: torch.Tensor, came: Tensors, given: Tensors) -> Deviation:
    """Checks the results of a contestant.

    Args:
        task: what it was told to do.
        x: [N, D], the tokens that it was given.
        came: its weights W_enc, b_enc, b_dec, perhaps threshold; codes [N, F]; x_hat; which latents
            these tokens used, int64 [n]; of them W_dec [n, D] and, for training, how far the
            encoder's rows moved, "moved" [n, D].
        given: values and indices [N, k] of the codes to decode.

    Raises:
        WrongResult: says what is wrong.
    """
    u, used = torch.finfo(getattr(torch, task.dtype)).eps / 2, came["used"]
    weights = {name: came[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for name, tensor in came.items():
        if not bool(tensor.isfinite().all()):
            raise WrongResult(f"{name}: expected finite numbers, got NaN or infinity")
    if task.operation == "decode":
        n = x.shape[0]
        codes = weights["b_enc"].new_zeros(n, weights["b_enc"].shape[0])
        codes.scatter_(1, given["indices"][:n], given["values"][:n].double())
        return _reconstruction(codes[:, used], 0 * codes[:, used], came, weights, u)
    centred = x.double() - weights["b_dec"]
    h = centred @ weights["W_enc"].T + weights["b_enc"]
    terms = centred.abs() @ weights["W_enc"].abs().T + weights["b_enc"].abs()
    off = (2 * u + x.shape[1] * _U32) * terms + u * h.abs()
    if task.operation == "product":
        return _within("product", came["codes"], h, off)
    kept = came["codes"] != 0
    _selection(task, h, off, kept, came.get("threshold"))
    exact = torch.where(kept, h, 0)
    off = torch.where(kept, 2 * off, 0)  # as much again for a scale that was folded
    deviation = _within("code", came["codes"], exact, off)
    if "x_hat" not in came:
        return deviation
    if "moved" in came:
        _movement(task, x.double(), exact[:, used], weights, came["moved"])
    return _reconstruction(exact[:, used], off[:, used], came, weights, u)


def _selection(
    task: Task, h: torch.Tensor, off: torch.Tensor, kept: torch.Tensor, bound: torch.Tensor | None
) -> None:
    low, high = h - off, h + off
    if task.architecture in ("jumprelu", "relu"):
        edge = h.new_zeros(()) if bound is None else bound.double()
        wrong = (kept & (high < edge)) | (~kept & (low > edge))
    else:
        count = task.k if task.architecture == "topk" else task.k * h.shape[0]
        if task.architecture == "batch_topk":
            low, high, kept = (t.reshape(1, -1) for t in (low, high, kept))
        n = kept.sum(1, keepdim=True)
        weakest = high.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
        # A row with fewer than its share has no positive score left.
        weakest = torch.where(n < count, weakest.clamp(max=0), weakest)
        wrong = (n > count) | (~kept & (low > weakest))
    if bool(wrong.any()):
        raise WrongResult(
            f"kept latents: {int(wrong.sum())} of {wrong.numel()} are not the largest"
        )


def _reconstruction(
    codes: torch.Tensor, off: torch.Tensor, came: Tensors, weights: Tensors, u: float
) -> Deviation:
    W, b = weights["W_dec"], weights["b_dec"]
    exact = codes @ W + b
    n = int((codes != 0).sum(1).max()) + 1
    terms = codes.abs() @ W.abs() + b.abs()
    budget = off @ W.abs() + (2 * u + n * _U32) * terms + 2 * u * exact.abs()
    return _within("reconstruction", came["x_hat"], exact, budget)


def _within(what: str, came: torch.Tensor, exact: torch.Tensor, budget: torch.Tensor) -> Deviation:
    """The error of a result; raises where it is over the budget."""
    off = (came - exact).abs()
    wrong = off > budget
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise WrongResult(
            f"{what} at [{row}, {column}]: expected {exact[row, column]:.6g} within "
            f"{budget[row, column]:.2g}, got {came[row, column]:.6g}; {int(wrong.sum())} of "
            f"{wrong.numel()} are wrong"
        )
    scale = float(exact.abs().max())
    return Deviation(float(off.max()) / scale, float(budget.max()) / scale)


def _movement(
    task: Task, x: torch.Tensor, codes: torch.Tensor, weights: Tensors, moved: torch.Tensor
) -> None:
    """Raises unless the encoder's rows moved against the gradient of the loss."""
    error = codes @ weights["W_dec"] + weights["b_dec"] - x
    slope = 2 * error @ weights["W_dec"].T / (x - x.mean(0)).square().sum()
    if task.architecture == "relu":  # the L1 penalty, beside the loss divided by the variance
        slope = slope + task.options["coefficient"] / x.shape[0]
    gradient = torch.where(codes != 0, slope, 0).T @ (x - weights["b_dec"])
    clear = gradient.abs() > gradient.square().mean().sqrt()
    agree = float((moved[clear].sign() == -gradient[clear].sign()).double().mean())
    if not agree >= _AGREE:
        raise WrongResult(
            f"training: expected at least {_AGREE:.0%} of the encoder's elements with a clear "
            f"gradient to move against it, got {agree:.1%}"
        )
