"""auxk on the CPU: selection by the host kernels, products by torch.

With k near d_in / 2 of a few thousand latents, dense products beat gathers. Tokens go through in
tiles, so that no buffer grows with the batch. torch's bf16 products come out in bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives.checks import gradient_operand
from sae_kernels.primitives.select_topk import cpu as select_topk

if TYPE_CHECKING:
    import torch

_TILE_BYTES = 4 << 20


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
    """Gathers the latents in use into compact matrices and works on those."""
    used = int(count)
    rows = latents[:used].long()
    product = gradient_operand(x.dtype)
    W_enc, b_enc, W_dec = W_enc[rows], b_enc[rows], W_dec[rows].to(x.dtype).to(product)
    sse = residual.new_zeros(())
    widths = x.shape[1], residual.shape[1]
    dW_enc, dW_dec = (residual.new_zeros(latents.shape[0], width) for width in widths)
    db_enc = residual.new_zeros(latents.shape[0])
    if not used or not x.shape[0]:
        return sse, dW_enc, db_enc, dW_dec
    if variance is None:
        variance = (residual - residual.mean(0)).square().sum()
    weight = alpha * min(used / k, 1.0) / variance
    tile = max(64, _TILE_BYTES // (4 * used))
    for tokens, r in zip(x.split(tile), residual.split(tile), strict=True):
        values, indices = select_topk.run(tokens, W_enc, b_enc, min(k, used), None)
        codes = values.new_zeros(r.shape[0], used).scatter_(1, indices.long(), values.relu_())
        codes = codes.to(x.dtype).to(product)
        error = (codes @ W_dec).to(r.dtype) + r
        sse += error.square().sum()
        grad = (2 * weight * error).to(product)
        dW_dec[:used] += codes.T @ grad
        dh = (grad @ W_dec.T) * (codes != 0)
        dW_enc[:used] += dh.T @ tokens.to(product)
        db_enc[:used] += dh.sum(0)
    return weight * sse, dW_enc, db_enc, dW_dec
