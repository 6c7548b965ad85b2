"""AuxK: dead latents learn to reconstruct what the living ones leave over (arXiv 2406.04093, A.2).

With the residual ``r = x - x_hat`` (constant) and the dead latents alone, each token's k_aux
largest ``relu(h)`` give ``e`` without a bias, and the loss is
``alpha * min(n_dead / k_aux, 1) * sum |e - r|^2 / sum |r - mean(r)|^2``. Gradients reach W_enc,
b_enc and W_dec of the dead latents and nothing else.

The dead latents are gathered into compact matrices and the codes written out densely there: with
k_aux near d_in / 2 of a few thousand latents, dense products beat gathers. Tokens go through in
tiles, so that no buffer grows with the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sae_kernels.functional import encode_topk
from sae_kernels.primitives.select_topk import select_topk

_TILE_BYTES = 4 << 20


class DeadRows(NamedTuple):
    """The compact matrices of the dead latents, operands in the compute dtype.

    Attributes:
        W_enc, W_dec: [A, D].
        b_enc: [A], fp32.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor


class AuxGradients(NamedTuple):
    """AuxK's loss (fp32 scalar) and its gradients, fp32, rows as in DeadRows."""

    loss: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor


def loss_weight(residual: torch.Tensor, n_dead: int, k_aux: int, alpha: float) -> torch.Tensor:
    """What multiplies the squared error: alpha, the few-dead scale, one over the variance."""
    variance = (residual - residual.mean(0)).square().sum()
    return alpha * min(n_dead / k_aux, 1.0) / variance


def gradients(
    x_centred: torch.Tensor,
    residual: torch.Tensor,
    dead: DeadRows,
    k_aux: int,
    alpha: float,
    backend: str | None = None,
) -> AuxGradients:
    """The closed form of :func:`loss`.

    Args:
        x_centred: [B, D] in the compute dtype, as the encoder saw it.
        residual: fp32 [B, D], ``x - x_hat``.
        dead: the dead latents' rows.
        k_aux: latents per token (at most those there are).
        alpha: the loss's coefficient.
        backend: see :mod:`sae_kernels.backends`.
    """
    n_dead, dtype = dead.W_enc.shape[0], dead.W_enc.dtype
    W_dec = dead.W_dec.to(_product_dtype(dtype))
    weight = loss_weight(residual, n_dead, k_aux, alpha)
    total = residual.new_zeros(())
    dW_enc, dW_dec = (residual.new_zeros(dead.W_enc.shape) for _ in range(2))
    db_enc = residual.new_zeros(n_dead)
    tile = max(64, _TILE_BYTES // (4 * n_dead))
    for x, r in zip(x_centred.split(tile), residual.split(tile), strict=True):
        values, indices = select_topk(
            x, dead.W_enc, dead.b_enc, min(k_aux, n_dead), None, backend=backend
        )
        codes = values.new_zeros(x.shape[0], n_dead).scatter_(1, indices.long(), values.relu_())
        fired = codes > 0
        codes = codes.to(dtype).to(W_dec.dtype)
        error = (codes @ W_dec).float() - r
        total += error.square().sum()
        grad = (2 * weight * error).to(W_dec.dtype)
        dW_dec += codes.T @ grad
        dh = (grad @ W_dec.T) * fired
        dW_enc += dh.T @ x.to(W_dec.dtype)
        db_enc += dh.sum(0)
    return AuxGradients(weight * total, dW_enc, db_enc, dW_dec)


def loss(
    x_centred: torch.Tensor,
    residual: torch.Tensor,
    dead: DeadRows,
    k_aux: int,
    alpha: float,
    compute_dtype: torch.dtype,
    backend: str | None = None,
) -> torch.Tensor:
    """The same loss for autograd: differentiable in the rows of ``dead`` only."""
    n_dead = dead.W_enc.shape[0]
    codes = encode_topk(
        x_centred.detach(),
        dead.W_enc,
        dead.b_enc,
        min(k_aux, n_dead),
        compute_dtype=compute_dtype,
        backend=backend,
    )
    e = _operand(codes.to_dense(), compute_dtype) @ _operand(dead.W_dec, compute_dtype)
    residual = residual.detach()
    weight = loss_weight(residual, n_dead, k_aux, alpha)
    return weight * (e.float() - residual).square().sum()


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    # In fp16 gradients vanish (they are divided by the batch's whole variance) and sums overflow.
    return torch.float32 if dtype == torch.float16 else dtype


def _operand(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to ``dtype``, in the dtype of the product; the gradient is not rounded to fp16."""
    if _product_dtype(dtype) == dtype:
        return t.to(dtype)
    return t + (t.to(dtype).to(t.dtype) - t).detach()
