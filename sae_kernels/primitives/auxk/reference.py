"""auxk in plain torch: the specification. The host never learns how many latents are in use."""

from __future__ import annotations

import torch

from sae_kernels.primitives.checks import accumulator, gradient_operand


def run(
    x: torch.Tensor,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    latents: torch.Tensor,
    count: torch.Tensor,
    k: int,
    alpha: float,
    variance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds operands to the operand dtype and multiplies in the accumulator dtype."""
    dtype, high = x.dtype, accumulator(x.dtype)
    to_product = gradient_operand(dtype)
    rows = latents.clamp(min=0).long()
    used = torch.arange(latents.shape[0], device=x.device) < count
    h = x.to(high) @ W_enc[rows].to(high).T + b_enc[rows]
    h = torch.where(used, h, -torch.inf)
    order = h.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(h).scatter(1, order, h.gather(1, order).relu())
    codes = kept.to(dtype).to(high)
    W = torch.where(used[:, None], W_dec[rows].to(dtype).to(high), 0)
    error = codes @ W + residual
    if variance is None:
        variance = (residual - residual.mean(0)).square().sum()
    some = (count > 0) & (x.shape[0] > 0)
    weight = torch.where(some, alpha * (count.to(high) / k).clamp(max=1) / variance, 0)
    grad = (2 * weight * error).to(to_product).to(high)
    dh = torch.where(codes != 0, grad @ W.T, 0).to(to_product).to(high)
    return weight * error.square().sum(), dh.T @ x.to(high), dh.sum(0), codes.T @ grad
