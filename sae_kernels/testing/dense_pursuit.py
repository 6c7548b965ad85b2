"""Matching pursuit written densely, token by token: the oracle of MatchingPursuitSAE."""

from __future__ import annotations

import torch


def dense_pursuit(
    x: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    k: int,
    *,
    residual_threshold: float = 0.0,
    stop_on_repeat: bool = True,
) -> torch.Tensor:
    """The codes [B, F] of a matching pursuit SAE, differentiable, in the dtype of the operands.

    Args:
        x: [B, D].
        W_dec: [F, D].
        b_dec: [D], subtracted first.
        k: most latents chosen per token.
        residual_threshold: norm of what is left below which no further one is; 0 is off.
        stop_on_repeat: none is after one that was chosen before.

    Example:
        >>> dense_pursuit(torch.tensor([[3.0, 2.0]]), torch.eye(2), torch.zeros(2), k=1)
        tensor([[3., 0.]])
    """
    rows = []
    for left in x - b_dec:
        codes, chosen = left.new_zeros(len(W_dec)), set[int]()
        for _ in range(k):
            products = W_dec @ left
            best = int(products.argmax())
            if products[best] <= 0:
                break
            codes = codes + products[best] * torch.eye(len(W_dec), dtype=x.dtype)[best]
            left = left - products[best] * W_dec[best]
            if (best in chosen and stop_on_repeat) or left.norm() < residual_threshold:
                break
            chosen.add(best)
        rows.append(codes)
    return torch.stack(rows)
