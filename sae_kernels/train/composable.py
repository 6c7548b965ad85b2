"""The composable route: the public differentiable functions under torch.optim.Adam.

What a user writes by hand with any loss and any optimizer. It has the interface of FusedStep, which
is held to it by a test; gradients are dense tensors here, so it is slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.train.compute import compute_dtype
from sae_kernels.train.dead import DeadLatents
from sae_kernels.train.losses import autograd_losses, checked_batch
from sae_kernels.train.step import StepResult

if TYPE_CHECKING:
    from sae_kernels.nn import TopKSAE
    from sae_kernels.train.config import TrainConfig


class ComposableStep:
    """Trains a :class:`~sae_kernels.nn.TopKSAE` in place through autograd.

    Args and attributes as of :class:`~sae_kernels.train.step.FusedStep`, with ``optimizer`` in the
    place of ``rows``.
    """

    def __init__(self, sae: TopKSAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        sae.compute_dtype = compute_dtype(config.compute, sae.W_enc.device)
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.Adam(
            sae.parameters(), lr=1.0, betas=betas, eps=config.eps, fused=True
        )
        device = sae.W_enc.device
        self.dead = DeadLatents(sae.config.n_latents, config.dead_after_tokens, device)
        self.n_updates = torch.zeros((), dtype=torch.int64, device=device)
        self.k_aux = config.k_aux or max(1, sae.config.d_in // 2)

    def __call__(self, x: torch.Tensor, *, lr: float, k: int | None = None) -> StepResult:
        """One step on raw activations [B, D] with this learning rate and k."""
        sae, config = self.sae, self.config
        x = checked_batch(x, sae.config)
        dead = self.dead.longest(config.auxk_latents if config.auxk_alpha else 0)
        k = sae.config.k if k is None else k
        loss, aux, fvu, codes = autograd_losses(sae, x, config, k, dead, self.k_aux)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if sae.config.unit_norm_decoder:
            sae.remove_parallel_gradient_()
        finite = loss.detach().isfinite()
        if config.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip_norm)
            finite = finite & norm.isfinite()
        if finite:
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            if sae.config.unit_norm_decoder:
                sae.normalize_decoder_()
            self.n_updates += 1
        fired = codes.latent_order(
            drop_zeros=sae.config.relu != "none", backend=sae.backend
        ).counts()
        self.dead.update(fired, x.shape[0], ~finite)
        l0 = fired.sum() / x.shape[0]
        return StepResult(loss.detach(), fvu, l0, aux.detach(), ~finite)
