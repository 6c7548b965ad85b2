"""The composable route: the public differentiable functions under torch.optim.Adam.

What a user writes by hand with any loss and any optimizer. It has the interface of FusedStep, which
is held to it by a test; gradients are dense tensors here, so it is slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.step import autograd
from sae_kernels.step.base import Progress
from sae_kernels.step.batch import checked_batch, loss_scale
from sae_kernels.step.compute import compute_dtype
from sae_kernels.step.fused_step import StepResult
from sae_kernels.step.objective import k_of, kept_per_token, objective

if TYPE_CHECKING:
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.state import State


class ComposableStep(Progress):
    """Trains a :class:`~sae_kernels.nn.SparseAutoencoder` in place through autograd.

    Args and attributes as of :class:`~sae_kernels.step.FusedStep`, with ``optimizer`` in the place
    of ``rows``.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig) -> None:
        super().__init__(sae, config)
        sae.compute_dtype = compute_dtype(config.compute, sae.W_enc.device)
        self.optimizer = autograd.adam(sae, config)
        self.n_updates = torch.zeros((), dtype=torch.int64, device=sae.W_enc.device)

    def _living(self) -> dict[str, torch.Tensor]:
        return super()._living() | {"n_updates": self.n_updates}

    def state(self) -> State:
        """Everything but the weights that the next step depends on."""
        return super().state() | autograd.adam_state(self.optimizer)

    def load_state(self, state: State) -> None:
        """Takes up what :meth:`state` gave."""
        super().load_state(state)
        autograd.load_adam_state(self.optimizer, state)

    def __call__(
        self,
        x: torch.Tensor,
        *,
        lr: float,
        k: float | None = None,
        target: torch.Tensor | None = None,
    ) -> StepResult:
        """One step on raw activations [B, input width] with this learning rate and k."""
        sae, config = self.sae.train(), self.config
        x, target = checked_batch(sae, x, target)
        scale, variance = loss_scale(target, config.loss)
        k = k_of(sae, k)
        pre = sae.select(sae.centred(x), k=kept_per_token(sae, k, config))
        facts = autograd.facts(sae, config, x, k, self.dead)
        aim = objective(sae, pre, facts, self.schedule)
        ends = self.prefixes()
        loss, main = x.new_zeros(()), None
        for part in aim.reconstructions:
            e = autograd.reconstruct(sae, pre, part, x, ends) - target
            loss = loss + part.weight * scale * autograd.squared_error(e, ends)
            if main is None:
                main = e.detach() if ends is None else e[-1].detach()
        assert main is not None
        if aim.penalty is not None:
            loss = loss + aim.penalty
        aux = autograd.aux_loss(sae, config, self.dead, x, -main)
        loss = loss + aux
        finite = autograd.update(sae, self.optimizer, loss, lr, config.clip_norm)
        self.n_updates += finite
        fired = autograd.fired(sae, config, pre, aim, k)
        l0 = fired.sum() / x.shape[0]
        self.advance(fired, x.shape[0], l0, finite)
        fvu = main.square().sum() / variance
        return StepResult(loss.detach(), fvu, l0, aux.detach(), ~finite, fired)
