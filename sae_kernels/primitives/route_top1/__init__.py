"""route_top1: which expert each token goes to, and the softmax over all of them.

``logits = x W^T + b`` in the accumulator dtype; ``probabilities = softmax(logits)``, and a token's
expert is the first of the largest logits, where NaN of any payload ranks above +inf.
"""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator


def _check(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> None:
    checks.encoder(x, W, b)
    if W.shape[0] < 1:
        raise ValueError(f"W: expected at least one expert, got shape {list(W.shape)}")


def _fake(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    probabilities = x.new_empty((x.shape[0], W.shape[0]), dtype=checks.accumulator(x.dtype))
    return x.new_empty(x.shape[0], dtype=torch.int32), probabilities


route_top1 = Operator(
    "route_top1(Tensor x, Tensor W, Tensor? b, str backend) -> (Tensor, Tensor)", _check, _fake
)
