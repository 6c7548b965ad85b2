"""An SAE that replaces a layer's output, and its own part of the end-to-end loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.harvest.splice import check_fits
from sae_kernels.step.autograd_loss import autograd_loss
from sae_kernels.step.base import loss_scale

if TYPE_CHECKING:
    from sae_kernels.step import StepBase
    from sae_kernels.training.end_to_end.loss import EndToEnd


class Measured(NamedTuple):
    """Losses of the SAE at its own layer; scalars but for ``fired``.

    Attributes:
        loss: this layer's part of the loss.
        unit: factor of the other parts: 1, or with "mse" the layer's variance per token.
        fvu, l0, sparsity, aux_loss: see :class:`~sae_kernels.training.end_to_end.EndToEndLoss`.
        fired: int [F], how often each latent fired.
    """

    loss: Tensor
    unit: Tensor
    fvu: Tensor
    l0: Tensor
    sparsity: Tensor
    aux_loss: Tensor
    fired: Tensor


class SplicedSAE:
    """Callable that reconstructs activations [n, D] and keeps their losses.

    Args:
        step: the SAE's training step, with objective, schedule and dead latents.
        layer: the name of the layer that the SAE reconstructs.
        weights: coefficients of the parts of the loss.
        k: replaces the configuration's k.

    Attributes:
        measured: losses of the last call; None before.
    """

    def __init__(
        self, step: StepBase, layer: str, weights: EndToEnd, k: float | None = None
    ) -> None:
        self.training_step, self.layer, self.weights, self.k = step, layer, weights, k
        self.sae = step.sae
        self.measured: Measured | None = None

    def __call__(self, x: Tensor) -> Tensor:
        sae, step = self.sae, self.training_step
        check_fits(sae, x.shape[-1], self.layer)
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * sae.config.activation_scale
        loss = step.objective.loss
        scale, variance = loss_scale(x, loss)
        context = step.context(sae.centred(x), x, scale, self.k)
        weight = self.weights.reconstruction_coefficient
        result = autograd_loss(step, context, x, weight=weight)
        # Where no error weighs it stays out: a single token has no variance, 0 * inf is NaN.
        error = result.penalty.new_zeros(()) if result.error is None else result.error
        self.measured = Measured(
            loss=error + result.penalty + result.aux_loss,
            unit=torch.ones_like(variance) if loss == "fvu" else scale * variance,
            fvu=result.squared_error / variance,
            l0=result.fired.sum() / len(x),
            sparsity=result.penalty.detach(),
            aux_loss=result.aux_loss.detach(),
            fired=result.fired,
        )
        return result.x_hat / sae.target_scale
