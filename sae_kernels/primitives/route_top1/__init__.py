"""The expert of every token and the router's probabilities."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive()
def route_top1(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the expert with the largest logit for every token; softmax over all experts.

    ``logits = x W^T + b`` in the accumulator dtype, ``probabilities = softmax(logits)``. Of equal
    logits the first wins, and NaN of any payload ranks above +inf.

    Args:
        x: tokens [B, D] in an operand dtype.
        W: router [E, D] in the dtype of x.
        b: bias [E] in the accumulator dtype, or None.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Experts int32 [B] and probabilities [B, E] in the accumulator dtype.
    """
    checks.encoder(x, W, b)
    if W.shape[0] < 1:
        raise ValueError(f"W: expected at least one expert, got shape {list(W.shape)}")
    n_tokens, n_experts = x.shape[0], W.shape[0]
    probabilities = result([n_tokens, n_experts], checks.accumulator(x.dtype))
    return result([n_tokens], torch.int32), probabilities
