"""The losses of TopK training and what both training routes share of them.

With ``scale`` = 1 / sum |x - mean(x)|^2 ("fvu") or 1 / B ("mse") the reconstruction loss is
``scale * sum |x_hat - x|^2``; multi-TopK adds the same of the 4k reconstruction, divided by 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.train import auxk

if TYPE_CHECKING:
    from sae_kernels.nn import TopKConfig, TopKSAE
    from sae_kernels.train.config import TrainConfig

_MULTI_TOPK, _MULTI_TOPK_WEIGHT = 4, 1 / 8


def checked_batch(x: torch.Tensor, config: TopKConfig) -> torch.Tensor:
    """The batch in fp32 and in the scale of training.

    Raises:
        ValueError: not [B, D] with at least one token.
    """
    if x.dim() != 2 or x.shape[1] != config.d_in or x.shape[0] == 0:
        raise ValueError(
            f"x: expected shape [B, {config.d_in}] with B > 0 (tokens by d_in), got {list(x.shape)}"
        )
    x = x.float()
    return x if config.activation_scale == 1 else x * config.activation_scale


def reconstruction_parts(k: int, n_latents: int, multi_topk: bool) -> list[tuple[int, float]]:
    """Each reconstruction's number of latents per token and its weight in the loss."""
    if not multi_topk:
        return [(k, 1.0)]
    return [(k, 1.0), (min(_MULTI_TOPK * k, n_latents), _MULTI_TOPK_WEIGHT)]


def loss_scale(
    x: torch.Tensor, loss: str, scratch: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What multiplies the squared error, and the batch's total variance about its mean.

    Sums go by token first, so that they do not depend on the number of threads.
    """
    deviation = torch.sub(x, x.mean(0), out=scratch)
    variance = deviation.square_().sum(1).sum()
    return (1 / variance if loss == "fvu" else torch.ones_like(variance) / x.shape[0]), variance


def autograd_losses(
    sae: TopKSAE, x: torch.Tensor, config: TrainConfig, k: int, dead: torch.Tensor, k_aux: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SparseCodes]:
    """The losses as autograd sees them.

    Args:
        sae: the module.
        x: [B, D], from :func:`checked_batch`.
        config: the settings.
        k: latents per token.
        dead: the dead latents that take part in AuxK, int64 [A], possibly empty.
        k_aux: AuxK's latents per token.

    Returns:
        The whole loss, AuxK's part, the FVU (no gradient) and the main codes.
    """
    scale, variance = loss_scale(x, config.loss)
    parts = reconstruction_parts(k, sae.config.n_latents, config.multi_topk)
    kept = sae.encode_scaled(x, k=max(count for count, _ in parts))
    total, errors = x.new_zeros(()), []
    for count, weight in parts:
        codes = SparseCodes(kept.values[:, :count], kept.indices[:, :count], kept.n_latents)
        error = sae.decode_scaled(codes) - x
        errors.append(error.detach())
        total = total + weight * scale * error.square().sum()
        if count == k:
            main = codes
    aux = x.new_zeros(())
    if dead.numel():
        rows = auxk.DeadRows(sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead])
        dtype = sae.compute_dtype or sae.W_enc.dtype
        x_centred = x - sae.b_dec if sae.config.subtract_b_dec else x
        aux = auxk.loss(x_centred, -errors[0], rows, k_aux, config.auxk_alpha, dtype, sae.backend)
    return total + aux, aux, errors[0].square().sum() / variance, main
