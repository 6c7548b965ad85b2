"""An SAE in the place of a layer's output, and what it adds to the end-to-end loss there."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.harvest.splice import check_fits
from sae_kernels.step import autograd
from sae_kernels.step.batch import loss_scale
from sae_kernels.step.dead import DeadLatents
from sae_kernels.step.objective import (
    fixed_prefixes,
    k_of,
    kept_per_token,
    objective,
    random_prefixes,
)

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.objective import Objective
    from sae_kernels.step.sparsity import SparsitySchedule
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
        sae: reconstructs one layer.
        layer: its name.
        weights: of the parts of the loss.
        schedule: the settings and how strong the penalty is.
        dead: the dead latents; None: none.
        k: in the place of the configuration's.

    Attributes:
        measured: of the last call; None before.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        layer: str,
        weights: EndToEnd,
        schedule: SparsitySchedule,
        dead: DeadLatents | None = None,
        k: float | None = None,
    ) -> None:
        self.sae, self.layer, self.weights, self.schedule = sae, layer, weights, schedule
        self.config = schedule.config
        device = sae.W_enc.device
        none = DeadLatents(sae.config.n_latents, self.config.dead_after_tokens, device)
        self.dead = none if dead is None else dead
        self.k = k_of(sae, k)
        self.measured: Measured | None = None

    def __call__(self, x: Tensor) -> Tensor:
        sae, config = self.sae, self.config
        check_fits(sae, x.shape[-1], self.layer)
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * sae.config.activation_scale
        pre = sae.select(sae.centred(x), k=kept_per_token(sae, self.k, config))
        facts = autograd.facts(sae, config, x, self.k, self.dead)
        aim = objective(sae, pre, facts, self.schedule)
        x_hat, error = self._reconstruct(pre, aim, x)
        scale, variance = loss_scale(x, config.loss)
        none = x_hat.new_zeros(())
        penalty = none if aim.penalty is None else aim.penalty
        residual = (x - x_hat).detach()
        aux = autograd.aux_loss(sae, config, self.dead, x, residual)
        fired = autograd.fired(sae, config, pre, aim, self.k)
        self.measured = Measured(
            # Where no error weighs it stays out: a single token has no variance, 0 * inf is NaN.
            loss=(none if error is None else scale * error) + penalty + aux,
            unit=torch.ones_like(variance) if config.loss == "fvu" else scale * variance,
            fvu=residual.square().sum() / variance,
            l0=fired.sum() / len(x),
            sparsity=penalty.detach(),
            aux_loss=aux.detach(),
            fired=fired,
        )
        return x_hat / sae.target_scale

    def _reconstruct(
        self, pre: SparseCodes, aim: Objective, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The reconstruction that is spliced in, and the weighted squared errors of all."""
        sae, config, coefficient = self.sae, self.config, self.weights.reconstruction_coefficient
        ends = fixed_prefixes(sae, config) or random_prefixes(sae, config, self.schedule.step)
        main, errors = None, []
        for part in aim.reconstructions:
            x_hat = autograd.reconstruct(sae, pre, part, x, ends)
            # A gate learns from its own reconstruction alone, so that one counts in any case.
            weight = coefficient if main is None or config.multi_topk else 1.0
            if weight:
                error = autograd.squared_error(x_hat - x, ends)
                errors.append(weight * part.weight * error)
            if main is None:
                main = x_hat if ends is None else x_hat[-1]
        assert main is not None
        return main, torch.stack(errors).sum() if errors else None
