"""Loss and gradients of a batch from its kept entries alone.

Order of work: encode, decode with residuals and code gradients, the entries' own formulas by
autograd, latent order, then the gradients as terms that the optimizer gathers. Nothing here is
proportional to B F or, but for per-latent vectors, to F.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from sae_kernels.functional import RoutedCodes
from sae_kernels.nn import SwitchSAE
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.terms import Gradient, Term
from sae_kernels.step.entries import Batch, Leaves, Operands, Pass, gradients_of_vectors
from sae_kernels.step.objective import (
    Facts,
    Reconstruction,
    kept_per_token,
    main_codes,
    objective,
)
from sae_kernels.step.router import router_gradients

if TYPE_CHECKING:
    from sae_kernels.codes import LatentOrder, SparseCodes
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.sparsity import SparsitySchedule


class Decoded(NamedTuple):
    """A reconstruction's share of the backward pass."""

    part: Reconstruction
    factor: torch.Tensor  # scalar: dL/dx_hat = factor * residual
    residual: torch.Tensor  # [B, width]; with prefixes their sums from each on, [G, B, width]
    grad: torch.Tensor  # like the entries: dL/dvalues
    loss: torch.Tensor
    error: torch.Tensor  # squared error, of the whole one of several prefixes


def sparse_pass(
    sae: SparseAutoencoder, operands: Operands, batch: Batch, schedule: SparsitySchedule
) -> Pass:
    """Runs the batch through the kernels."""
    k = kept_per_token(sae, batch.k, schedule.config)
    pre = sae.select(batch.x, W_enc=operands.W_enc, k=k)
    leaves = Leaves.of(sae, pre, batch)
    with torch.enable_grad():
        facts = Facts(batch.x.shape[0], batch.k, leaves.norms, leaves.sums, batch.dead)
        aim = objective(sae, leaves.entries(pre), facts, schedule)
    decoded = [_decode(sae, operands, batch, pre, part) for part in aim.reconstructions]
    slopes = leaves.gradients([(d.part.values, d.grad) for d in decoded], aim.penalty)
    order, fired = _orders(sae, pre, decoded, batch.k, schedule.config)
    gradients, dx_sum = _encoder_gradients(sae, order, slopes, batch)
    terms = _decoder_terms(order, pre, decoded, batch)
    gradients["W_dec"] = Gradient(terms, row_coef=slopes.get("norms"))
    db_dec = torch.stack(
        [d.factor * _total(d, batch).sum(0) for d in decoded if d.part.trains_decoder]
    ).sum(0)
    if "probabilities" in slopes:
        assert isinstance(sae, SwitchSAE)
        assert isinstance(pre, RoutedCodes)
        gradients |= router_gradients(sae, pre.routing, slopes["probabilities"], batch.x)
    if batch.skip_input is not None:
        gradients["W_skip"] = _skip_gradient(decoded, batch)
    loss = torch.stack([d.loss for d in decoded]).sum()
    main = decoded[0]
    residual = main.residual
    if batch.prefixes is not None:
        residual = residual[-1] / batch.prefixes.weights[-1]
    return Pass(
        loss=loss if aim.penalty is None else loss + aim.penalty.detach(),
        error=main.error,
        residual=residual,
        gradients=gradients,
        dx_sum=dx_sum,
        db_dec=db_dec,
        fired=fired,
        n_kept=pre.values.numel(),
    )


def _decode(
    sae: SparseAutoencoder,
    operands: Operands,
    batch: Batch,
    pre: SparseCodes,
    part: Reconstruction,
) -> Decoded:
    prefixes = batch.prefixes
    residual, squares, grad = decode_residual(
        part.values.detach(),
        pre.indices,
        operands.W_dec,
        sae.b_dec.detach(),
        batch.target,
        part.drops_zeros,
        None if prefixes is None else prefixes.ends,
        None if prefixes is None else prefixes.weights,
        pre.offsets,
        backend=sae.backend,
    )
    factor = 2 * part.weight * batch.scale
    if prefixes is None:
        error = whole = squares.sum()
    else:
        sums = squares.sum(1)
        error, whole = sums[-1], (prefixes.weights * sums).sum()
    return Decoded(part, factor, residual, factor * grad, factor / 2 * whole, error)


def _orders(
    sae: SparseAutoencoder,
    pre: SparseCodes,
    decoded: list[Decoded],
    k: float,
    config: TrainConfig,
) -> tuple[LatentOrder, torch.Tensor]:
    """The entries that have a gradient, by latent, and how often each latent fired."""
    drops, backend = sae.drops_zeros, sae.backend
    main = decoded[0].part.values.detach()
    live = main
    for other in decoded[1:]:
        live = torch.where(live != 0, live, other.part.values.detach())
    order = pre.with_values(live).latent_order(drop_zeros=drops, backend=backend)
    if len(decoded) == 1:
        return order, order.counts()
    codes = main_codes(pre, main, k, config)
    return order, codes.latent_order(drop_zeros=drops, backend=backend).counts()


def _encoder_gradients(
    sae: SparseAutoencoder, order: LatentOrder, slopes: dict[str, torch.Tensor], batch: Batch
) -> tuple[dict[str, Gradient], torch.Tensor]:
    """Those of W_enc and of all vectors, and dx_sum."""
    F = sae.config.n_latents
    bias = order.term(slopes["h"], None)
    terms, biases = [order.term(slopes["h"], batch.x)], [bias]
    if "sums" in slopes:
        terms.append(_one_row_each(slopes["sums"], batch.x.float().sum(0, keepdim=True)))
        biases.append(_one_row_each(batch.x.shape[0] * slopes["sums"], None))
    gradients = {"W_enc": Gradient(terms)}
    gradients |= gradients_of_vectors(sae, slopes, Gradient(biases))
    dx_sum = slopes["h"].new_zeros(F)
    if sae.config.subtract_b_dec:
        dx_sum = row_grad(biases, F, 1, backend=sae.backend).flatten()
    return gradients, dx_sum


def _one_row_each(coef: torch.Tensor, source: torch.Tensor | None) -> Term:
    """``coef[f] * source[0]`` for every latent whose coefficient is not 0."""
    live = coef != 0
    offsets = pad(live.cumsum(0), (1, 0)).to(torch.int32)
    entries = (~live).to(torch.int8).argsort(stable=True).to(torch.int32)
    return Term(offsets, entries, torch.zeros_like(entries), coef, source)


def _decoder_terms(
    order: LatentOrder, pre: SparseCodes, decoded: list[Decoded], batch: Batch
) -> list[Term]:
    if batch.prefixes is not None:
        # Of [G * B, width] the rows of a latent's own prefix, and with it of all after that.
        order = order.by_group(pre.indices, batch.prefixes.ends, batch.x.shape[0])
    return [
        order.term(d.factor * d.part.values.detach(), d.residual.flatten(0, -2))
        for d in decoded
        if d.part.trains_decoder
    ]


def _total(decoded: Decoded, batch: Batch) -> torch.Tensor:
    """The residual that every output's bias sees: with prefixes the weighted sum of all."""
    return decoded.residual if batch.prefixes is None else decoded.residual[0]


def _skip_gradient(decoded: list[Decoded], batch: Batch) -> Gradient:
    assert batch.skip_input is not None
    grads = [d.factor * _total(d, batch) for d in decoded if d.part.trains_decoder]
    return Gradient.whole(torch.stack(grads).sum(0).T @ batch.skip_input)
