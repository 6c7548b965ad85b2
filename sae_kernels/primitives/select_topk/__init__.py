"""select_topk: the encoder product and the k winners of each row, without the [B, F] scores.

``h = x W^T + b`` in the accumulator dtype; row by row the first k entries in the order
(``h * rank_scale`` descending, latent ascending), where NaN of any payload ranks above +inf and
-0 equals +0. Values are ``h`` of the winners, sorted in that order; ReLU is the caller's.
"""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator


def _check(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
) -> None:
    checks.shape("x", x, ["B", "D"], "tokens by d_in")
    checks.shape("W", W, ["F", x.shape[1]], "latents first, as wide as x")
    checks.shape("b", b, [W.shape[0]], "one bias per latent")
    checks.shape("rank_scale", rank_scale, [W.shape[0]], "one scale per latent")
    checks.dtype("x", x, checks.OPERAND_DTYPES)
    checks.dtype("W", W, (x.dtype,))
    accumulator = checks.accumulator(x.dtype)
    checks.dtype("b", b, (accumulator,))
    checks.dtype("rank_scale", rank_scale, (accumulator,))
    checks.same_device(x=x, W=W, b=b, rank_scale=rank_scale)
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one input (D >= 1), got shape {list(x.shape)}")
    if not 1 <= k <= W.shape[0]:
        raise ValueError(f"k: expected 1 <= k <= n_latents = {W.shape[0]}, got {k}")


def _fake(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.new_empty((x.shape[0], k), dtype=checks.accumulator(x.dtype))
    return values, x.new_empty((x.shape[0], k), dtype=torch.int32)


select_topk = Operator(
    "select_topk(Tensor x, Tensor W, Tensor? b, SymInt k, Tensor? rank_scale, str backend)"
    " -> (Tensor, Tensor)",
    _check,
    _fake,
)
