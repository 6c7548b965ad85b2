"""An SAE's loss under autograd, for the autograd step and for training through a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.nn.objective import objective_of
from sae_kernels.step import auxk

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Context, Prefixes, Reconstruction
    from sae_kernels.step.dead import DeadLatents


class AutogradLoss(NamedTuple):
    """A batch's reconstruction and losses; scalars unless a shape is given.

    Attributes:
        x_hat: [B, output width], the main reconstruction, differentiable.
        error: ``scale`` times the weighted squared errors of all reconstructions, differentiable;
            None where none of them counts.
        penalty: differentiable, 0 where there is none.
        aux_loss: AuxK, differentiable, 0 where no latent is dead.
        squared_error: of the main reconstruction.
        fired: int32 [F], how often each latent fired.
    """

    x_hat: torch.Tensor
    error: torch.Tensor | None
    penalty: torch.Tensor
    aux_loss: torch.Tensor
    squared_error: torch.Tensor
    fired: torch.Tensor


def autograd_loss(
    context: Context, x: torch.Tensor, dead: DeadLatents, *, weight: float = 1.0
) -> AutogradLoss:
    """Encodes a batch, reconstructs it and adds up what training minimises.

    Args:
        context: the batch, without leaves; its ``x`` is what the encoder multiplies.
        x: fp32 [B, input width], in the scale of training, for a skip connection.
        dead: what AuxK looks at.
        weight: of reconstructions that do not count in any case.
    """
    sae, objective = context.sae, context.objective
    pre = sae.select(context.x, k=sae.kept_per_token(context.k, objective))
    parts, penalty = objective_of(pre, context)
    x_hats = [_reconstruct(pre, part, x, context) for part in parts]
    counts = [1.0 if part.always else weight for part in parts]
    errors = [
        count * part.weight * _squared_error(x_hat - context.target, context.prefixes)
        for part, x_hat, count in zip(parts, x_hats, counts, strict=True)
        if count
    ]
    x_hat = x_hats[0] if context.prefixes is None else x_hats[0][-1]
    residual = (context.target - x_hat).detach()
    codes = sae.main_codes(pre, parts[0].values.detach(), context.k, objective)
    order = codes.latent_order(drop_zeros=sae.drops_zeros, backend=sae.backend)
    nothing = x_hat.new_zeros(())
    return AutogradLoss(
        x_hat=x_hat,
        error=context.scale * torch.stack(errors).sum() if errors else None,
        penalty=nothing if penalty is None else penalty,
        aux_loss=_aux_loss(context, residual, dead),
        squared_error=residual.square().sum(),
        fired=order.counts(),
    )


def _reconstruct(
    pre: SparseCodes, part: Reconstruction, x: torch.Tensor, context: Context
) -> torch.Tensor:
    """[B, output width] in the scale of training, or of each prefix [G, B, output width]."""
    codes = pre.with_values(part.values)
    if context.prefixes is None and part.trains_decoder:  # all that a decoder of another kind has
        return context.sae.decode_scaled(codes, x)
    return context.sae.decode_scaled(
        codes, x, prefixes=context.prefixes, frozen=not part.trains_decoder
    )


def _squared_error(e: torch.Tensor, prefixes: Prefixes | None) -> torch.Tensor:
    """The sum over all tokens; those of prefixes by their weights."""
    squares = e.square().sum((-1, -2))
    return squares if prefixes is None else (prefixes.weights * squares).sum()


def _aux_loss(context: Context, residual: torch.Tensor, dead: DeadLatents) -> torch.Tensor:
    """AuxK: how the dead latents alone reconstruct the residual; 0 where there are none."""
    sae, objective = context.sae, context.objective
    latents = dead.longest(objective.auxk_latents if objective.auxk_alpha else 0)
    if not latents.numel():
        return residual.new_zeros(())
    rows = auxk.DeadRows(sae.W_enc[latents], sae.b_enc[latents], sae.W_dec[latents])
    k_aux = auxk.latents_per_token(sae, objective)
    dtype = sae.compute_dtype or sae.W_enc.dtype
    return auxk.loss(context.x, residual, rows, k_aux, objective.auxk_alpha, dtype, sae.backend)
