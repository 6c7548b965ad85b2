"""An SAE in the place of a layer's output, and what it adds to the end-to-end loss there."""

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
    """What the SAE costs at its own layer; scalars but for ``fired``.

    Attributes:
        loss: this layer's part of the loss.
        unit: what multiplies the other parts: 1, or with "mse" the layer's variance per token.
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
    """Gives the reconstruction of activations [n, D] and keeps what it costs.

    Args:
        step: the SAE's training step, whose objective, schedule and dead latents count.
        layer: the name of the layer that the SAE reconstructs.
        weights: of the parts of the loss.
        k: in the place of the configuration's.

    Attributes:
        measured: of the last call; None before.
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
        result = autograd_loss(context, x, step.dead, weight=weight)
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
