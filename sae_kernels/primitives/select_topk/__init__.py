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
    checks.encoder(x, W, b, rank_scale=rank_scale)
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
