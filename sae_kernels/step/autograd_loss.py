"""Loss of an SAE under autograd, for AutogradStep and for end-to-end training."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.functional import encode_topk
from sae_kernels.nn.objective import objective_of
from sae_kernels.primitives.checks import gradient_operand
from sae_kernels.step.base import Variance

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Context, Prefixes, Reconstruction
    from sae_kernels.step.base import StepBase


class AutogradLoss(NamedTuple):
    """A batch's reconstruction and losses; scalars unless a shape is given.

    Attributes:
        x_hat: [B, output width], the main reconstruction, differentiable.
        error: ``scale`` times the weighted squared errors of all reconstructions, differentiable;
            None where all their weights are 0.
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
    step: StepBase,
    context: Context,
    x: torch.Tensor,
    *,
    weight: float = 1.0,
    auxk: AuxKOfMicroBatches | None = None,
) -> AutogradLoss:
    """Encodes and reconstructs a batch and returns the terms of its loss.

    Args:
        step: the step whose dead latents AuxK sees.
        context: the batch, without leaves; its ``x`` is the encoder's input.
        x: fp32 [B, input width], in the scale of training, for a skip connection.
        weight: factor of all reconstructions but those marked ``always``.
        auxk: takes in the AuxK loss of a micro-batch, undivided by the batch's variance.
    """
    sae, objective = context.sae, context.objective
    preacts = sae.select_in(context)
    parts, penalty = objective_of(preacts, context)
    x_hats = [_reconstruct(preacts, part, x, context) for part in parts]
    counts = [1.0 if part.always else weight for part in parts]
    errors = [
        count * part.weight * _squared_error(x_hat - context.target, context.prefixes)
        for part, x_hat, count in zip(parts, x_hats, counts, strict=True)
        if count
    ]
    x_hat = x_hats[0] if context.prefixes is None else x_hats[0][-1]
    residual = (context.target - x_hat).detach()
    codes = sae.main_codes(preacts, parts[0].values.detach(), context.k, objective)
    order = codes.latent_order(drop_zeros=sae.drops_zeros, backend=sae.backend)
    nothing = x_hat.new_zeros(())
    rows = dead_rows(step) if auxk is None else auxk.rows
    variance = None if auxk is None else auxk.add(residual)
    return AutogradLoss(
        x_hat=x_hat,
        error=context.scale * torch.stack(errors).sum() if errors else None,
        penalty=nothing if penalty is None else penalty,
        aux_loss=nothing if rows is None else _aux_loss(step, context, residual, rows, variance),
        squared_error=residual.square().sum(),
        fired=order.counts(),
    )


def _reconstruct(
    preacts: SparseCodes, part: Reconstruction, x: torch.Tensor, context: Context
) -> torch.Tensor:
    """x_hat in the scale of training: [B, output width], or per prefix [G, B, output width]."""
    codes = preacts.with_values(part.values)
    if context.prefixes is None and part.trains_decoder:  # all that a custom decoder supports
        return context.sae.decode_scaled(codes, x)
    return context.sae.decode_scaled(
        codes, x, prefixes=context.prefixes, frozen=not part.trains_decoder
    )


def _squared_error(e: torch.Tensor, prefixes: Prefixes | None) -> torch.Tensor:
    """The squared error summed over tokens; of prefixes the weighted sum."""
    squares = e.square().sum((-1, -2))
    return squares if prefixes is None else (prefixes.weights * squares).sum()


def _aux_loss(
    step: StepBase,
    context: Context,
    residual: torch.Tensor,
    rows: DeadRows,
    variance: torch.Tensor | None,
) -> torch.Tensor:
    """AuxK loss of the dead latents on the residual."""
    sae, alpha = step.sae, step.objective.auxk_alpha
    dtype = sae.compute_dtype or sae.W_enc.dtype
    return auxk_loss(context.x, residual, rows, step.k_aux, alpha, dtype, sae.backend, variance)


class DeadRows(NamedTuple):
    """Weights of the dead latents, operands in the compute dtype.

    Attributes:
        W_enc, W_dec: [A, D].
        b_enc: [A], fp32.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor


def dead_rows(step: StepBase) -> DeadRows | None:
    """The latents of a step's AuxK loss, differentiable; None if it is off or none is dead."""
    sae, objective = step.sae, step.objective
    latents = step.dead.longest(objective.auxk_latents if objective.auxk_alpha else 0)
    if not latents.numel():
        return None
    return DeadRows(sae.W_enc[latents], sae.b_enc[latents], sae.W_dec[latents])


class AuxKOfMicroBatches:
    """AuxK of a batch in micro-batches, whose residuals' variance is known after the last only.

    Losses of the micro-batches are not divided by it, and their gradients stay with copies of the
    dead latents' rows until :meth:`finish` divides them.

    Args:
        step: the step whose dead latents take part.

    Attributes:
        rows: the copies; None where no latent is dead.
    """

    def __init__(self, step: StepBase) -> None:
        self._sources, self._variance = dead_rows(step), Variance()
        self.rows = None
        if self._sources is not None:
            self.rows = DeadRows(*(t.detach().requires_grad_() for t in self._sources))

    def add(self, residual: torch.Tensor) -> torch.Tensor:
        """Takes in the residual of a micro-batch; what its loss is to be divided by."""
        if self.rows is not None:
            self._variance.add(residual)
        return residual.new_ones(())

    def finish(self, undivided: torch.Tensor) -> torch.Tensor:
        """Adds the gradients to the parameters' and divides the sum of the losses."""
        if self.rows is None or self._sources is None:
            return undivided
        weight = 1 / self._variance.total
        for source, copy in zip(self._sources, self.rows, strict=True):
            if source.requires_grad and copy.grad is not None:
                source.backward(weight * copy.grad)
        return weight * undivided


def auxk_loss(
    x_centred: torch.Tensor,
    residual: torch.Tensor,
    dead: DeadRows,
    k_aux: int,
    alpha: float,
    compute_dtype: torch.dtype,
    backend: str | None = None,
    variance: torch.Tensor | None = None,
) -> torch.Tensor:
    """AuxK loss, differentiable in ``dead`` only; :func:`~sae_kernels.primitives.auxk.auxk` has it.

    Args:
        x_centred: [B, D], the encoder's input.
        residual: fp32 [B, D], ``x - x_hat``.
        dead: weights of the dead latents.
        k_aux: latents per token; at most all dead ones are used.
        alpha: coefficient of the loss.
        compute_dtype: dtype of the products' operands.
        backend: see :mod:`sae_kernels.backends`.
        variance: what it is divided by; None is the residual's own.
    """
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
    if variance is None:
        variance = (residual - residual.mean(0)).square().sum()
    weight = alpha * min(n_dead / k_aux, 1.0) / variance
    return weight * (e.float() - residual).square().sum()


def _operand(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds an operand to ``dtype``; fp16 stays stored as fp32, its gradient unrounded."""
    if gradient_operand(dtype) == dtype:
        return t.to(dtype)
    return t + (t.to(dtype).to(t.dtype) - t).detach()
