"""Dense selection and activation functions, [B, F] in and out, in plain torch.

Nothing hides a NaN: it is the first to be kept, and a comparison with it gives NaN, not "no".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rank_order(key: Tensor) -> Tensor:
    """int64 like ``key``: positions in the last dimension, NaN first, then by key descending.

    Of equal keys the lower position comes first.

    Example:
        >>> rank_order(torch.tensor([1.0, 3.0, float("nan"), 3.0])).tolist()
        [2, 1, 3, 0]
    """
    # A radix sort would tell apart zeros, or NaNs, of different bits.
    key = key.masked_fill(key.isnan(), torch.nan) + 0.0
    return key.sort(dim=-1, descending=True, stable=True).indices


def topk_kept(key: Tensor, k: int) -> Tensor:
    """bool [..., F]: the first k latents of each token."""
    return torch.zeros_like(key, dtype=torch.bool).scatter_(-1, rank_order(key)[..., :k], True)


def batchtopk_kept(h: Tensor, key: Tensor, n: int) -> Tensor:
    """bool [B, F]: the first ``min(n, positives of h)`` entries of the batch; a NaN counts too."""
    candidate = ~(h <= 0)
    n = min(n, int(candidate.sum()))
    order = rank_order(key.masked_fill(~candidate, -torch.inf).flatten())
    kept = torch.zeros_like(candidate).flatten().scatter_(0, order[:n], True)
    return kept.view_as(h)


def indicator(condition: Tensor, *operands: Tensor) -> Tensor:
    """1 where the condition holds, 0 where it does not, NaN where one of its operands is NaN."""
    flags = condition.to(operands[0].dtype)
    for operand in operands:
        flags = flags.masked_fill(operand.isnan(), torch.nan)
    return flags


def times(flags: Tensor, values: Tensor) -> Tensor:
    """The product of an indicator and values, where a 0 wins over an infinity."""
    return torch.where(flags == 0, 0.0, flags * values)


def gated(pi: Tensor, magnitude: Tensor) -> Tensor:
    """``1[pi > 0] magnitude``, without gradient through the gate (Gated SAE, arXiv 2404.16014)."""
    return times(indicator(pi > 0, pi), magnitude)


def jumprelu(h: Tensor, theta: Tensor, w: float) -> Tensor:
    """``f = h 1[h > theta]`` of h [B, F] and theta [F] (JumpReLU SAE, arXiv 2407.14435).

    ``df/dh = 1[h > theta]`` and, straight through a window of width w around theta,
    ``df/dtheta = -(theta / w) 1[theta - w/2 < h < theta + w/2]``.
    """
    f: Tensor = _JumpReLU.apply(h, theta, w)
    return f


def step(h: Tensor, theta: Tensor, w: float) -> Tensor:
    """``H = 1[h > theta]`` of h [B, F] and theta [F], which sums to L0.

    ``dH/dh = 0`` and ``dH/dtheta = -(1 / w) 1[theta - w/2 < h < theta + w/2]``.
    """
    H: Tensor = _Step.apply(h, theta, w)
    return H


def _window(h: Tensor, theta: Tensor, w: float) -> Tensor:
    return indicator((theta - w / 2 < h) & (h < theta + w / 2), h, theta)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, w: float) -> Tensor:
        ctx.w = w
        ctx.save_for_backward(h, theta)
        return times(indicator(h > theta, h, theta), h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        h, theta = ctx.saved_tensors
        dh = times(indicator(h > theta, h, theta), g)
        dtheta = times(_window(h, theta, ctx.w), -(theta / ctx.w) * g)
        return dh, dtheta.sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, w: float) -> Tensor:
        ctx.w = w
        ctx.save_for_backward(h, theta)
        return indicator(h > theta, h, theta)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        h, theta = ctx.saved_tensors
        return None, times(_window(h, theta, ctx.w), -g / ctx.w).sum(0), None
