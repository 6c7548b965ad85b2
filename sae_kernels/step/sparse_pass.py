"""Loss and gradients of a batch from its kept entries alone.

After the encoder nothing costs O(B F), and only per-latent vectors cost O(F).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from sae_kernels.codes import LatentOrder
from sae_kernels.nn.objective import entry_gradients, latent_vectors, objective_of, with_leaves
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.nn.objective import Context, Reconstruction
    from sae_kernels.primitives.terms import Term


class PassResult(NamedTuple):
    """Loss and gradients of a batch, or a micro-batch's part of them.

    Attributes:
        loss: scalar, without AuxK.
        errors: scalar, the main reconstruction's squared error; with prefixes [G], that of each,
            the longest last.
        residual: fp32 [B, output width], the main reconstruction less the target.
        x: [B, input width], what the encoder read; None of several micro-batches.
        preacts: the kept entries; None of several micro-batches and from dense products.
        gradients: of all parameters by name; b_dec's through the output alone.
        dh_sum: [F], dL/dh summed over tokens; ``W_enc^T dh_sum`` is the summed gradient of x.
        fired: int32 [F], how often each latent fired.
        n_kept: number of entries that the encoder kept.
    """

    loss: torch.Tensor
    errors: torch.Tensor
    residual: torch.Tensor
    x: torch.Tensor | None
    preacts: SparseCodes | None
    gradients: dict[str, Gradient]
    dh_sum: torch.Tensor
    fired: torch.Tensor
    n_kept: int


def sparse_pass(
    sae: SparseAutoencoder, W_enc: torch.Tensor, W_dec: torch.Tensor, context: Context
) -> PassResult:
    """Loss and gradients of a batch: encode, decode, differentiate entries, group them by latent.

    Args:
        sae: in training mode.
        W_enc, W_dec: the matrices that kernels read: compute copies, or the parameters.
        context: the batch, with leaves.
    """
    assert context.leaves is not None
    preacts = sae.select_in(context, W_enc)
    with torch.enable_grad():
        entries, leaves = with_leaves(sae, preacts)
        parts, penalty = objective_of(entries, context)
        read = [sae.decoder_codes(preacts.with_values(part.values)) for part in parts]
    decoded = [
        _decode(W_dec, codes, part, context) for codes, part in zip(read, parts, strict=True)
    ]
    outputs = [(codes.values, d.grad) for codes, d in zip(read, decoded, strict=True)]
    grads = entry_gradients({**leaves, **context.leaves}, outputs, penalty)
    live, order, fired = _latent_order(preacts, parts, context)

    gradients, dh_sum = _encoder_gradients(order, preacts.indices, grads, context)
    taught = [d for part, d in zip(parts, decoded, strict=True) if part.trains_decoder]
    by_norms = grads.get("norms")
    # The codes that were read, or, of several reconstructions, the entries of any.
    rows = read[0] if len(read) == 1 else sae.decoder_codes(live)
    if rows.indices is not preacts.indices:  # W_dec has other rows than one a latent
        order = rows.latent_order(drop_zeros=sae.drops_zeros, backend=sae.backend)
    gradients["W_dec"] = Gradient(
        _decoder_terms(order, rows.indices, taught, context),
        None if by_norms is None else sae.row_coefficients(by_norms),
    )
    gradients |= sae.leaf_gradients(preacts, grads, context)
    if context.skip_input is not None:
        dx_hat = total_of([d.factor * d.total for d in taught])
        gradients["W_skip"] = Gradient.whole(dx_hat.T @ context.skip_input)
    db_dec = total_of([d.factor * sae.by_token(d.total).sum(0) for d in taught])
    gradients["b_dec"] = Gradient.whole(db_dec[None])
    loss = total_of([d.loss for d in decoded])
    return PassResult(
        loss=loss if penalty is None else loss + penalty.detach(),
        errors=decoded[0].errors,
        residual=sae.by_token(decoded[0].main_residual(context)),
        x=context.x,
        preacts=preacts,
        gradients=gradients,
        dh_sum=dh_sum,
        fired=fired,
        n_kept=preacts.values.numel(),
    )


class _Decoded(NamedTuple):
    """A reconstruction's loss and its part of the backward pass.

    Attributes:
        values: like the entries.
        factor: scalar; dL/dx_hat is ``factor * total``.
        residual: fp32 [B, width]; with prefixes [G, B, width], for each g the weighted sum of the
            residuals of prefix g and all longer ones.
        grad: like the entries, dL/dvalues.
        loss: scalar.
        errors: scalar, the squared error; with prefixes [G], that of each.
    """

    values: torch.Tensor
    factor: torch.Tensor
    residual: torch.Tensor
    grad: torch.Tensor
    loss: torch.Tensor
    errors: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """[B, width], the residual; with prefixes the weighted sum of all."""
        return self.residual if self.residual.dim() == 2 else self.residual[0]

    def main_residual(self, context: Context) -> torch.Tensor:
        """[B, width], the residual of the reconstruction from all latents."""
        if context.prefixes is None:
            return self.residual
        return self.residual[-1] / context.prefixes.weights[-1]


def _decode(
    W_dec: torch.Tensor, codes: SparseCodes, part: Reconstruction, context: Context
) -> _Decoded:
    """Decodes the codes of a reconstruction, as :meth:`decoder_codes` gives them."""
    sae, prefixes, values = context.sae, context.prefixes, codes.values.detach()
    decoded = decode_residual if context.ranks is None else context.ranks.decode_residual
    residual, squares, grad = decoded(
        values,
        codes.indices,
        W_dec,
        *sae.decoder_target(context.target),
        part.drops_zeros,
        None if prefixes is None else prefixes.ends,
        None if prefixes is None else prefixes.weights,
        codes.offsets,
        backend=sae.backend,
    )
    half = context.scale if part.weight == 1 else part.weight * context.scale
    factor = 2 * half
    if prefixes is None:
        errors = whole = squares.sum()
    else:
        errors = squares.sum(1)
        whole = (prefixes.weights * errors).sum()
    return _Decoded(values, factor, residual, factor * grad, half * whole, errors)


def _latent_order(
    preacts: SparseCodes, parts: list[Reconstruction], context: Context
) -> tuple[SparseCodes, LatentOrder, torch.Tensor]:
    """Entries, 0 where none has a gradient; their latent order; how often each latent fired."""
    sae = context.sae
    drops, backend = sae.drops_zeros, sae.backend
    main, *others = [part.values.detach() for part in parts]
    values = main
    for other in others:
        values = torch.where(values != 0, values, other)
    live = preacts.with_values(values)
    order = live.latent_order(drop_zeros=drops, backend=backend)
    if not others:
        return live, order, order.counts()
    codes = sae.main_codes(preacts, main, context.k, context.objective)
    return live, order, codes.latent_order(drop_zeros=drops, backend=backend).counts()


def _encoder_gradients(
    order: LatentOrder,
    indices: torch.Tensor,
    grads: dict[str, torch.Tensor],
    context: Context,
) -> tuple[dict[str, Gradient], torch.Tensor]:
    """Gradients of W_enc and the per-latent vectors, plus the summed dL/dh."""
    sae, F = context.sae, len(context.sae.latents)
    terms = [sae.encoder_term(order, indices, grads["h"], context.x)]
    biases = [order.term(grads["h"], None)]
    if "preact_sums" in grads:
        by_sum = grads["preact_sums"]
        every, latents = _one_entry_each(by_sum)
        x_sum = context.x.float().sum(0, keepdim=True)
        terms.append(sae.encoder_term(every, latents, by_sum, x_sum))
        biases.append(every.term(context.n_tokens * by_sum, None))
    gradients = {"W_enc": Gradient(terms), **vector_gradients(sae, grads, Gradient(biases))}
    if not sae.config.subtract_b_dec:
        return gradients, grads["h"].new_zeros(F)
    return gradients, row_grad(biases, F, 1, backend=sae.backend)[0].flatten()


def total_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of one tensor or more of the same shape."""
    return sum(parts[1:], parts[0])


def vector_gradients(
    sae: SparseAutoencoder, grads: dict[str, torch.Tensor], db_enc: Gradient
) -> dict[str, Gradient]:
    """Gradients of all per-latent vectors, each as a matrix of width 1.

    Args:
        sae: the module.
        grads: of :func:`~sae_kernels.nn.objective.entry_gradients`.
        db_enc: b_enc's part from the encoder product, as terms only.
    """
    result = {"b_enc": db_enc}
    if grads.keys() <= {"h"}:  # most SAEs: the walk through all parameters is spared
        return result
    for name in latent_vectors(sae):
        if name in grads:
            terms = result.get(name, Gradient()).terms
            result[name] = Gradient.whole(grads[name][:, None])._replace(terms=terms)
    return result


def rows_weighted(W: torch.Tensor, weights: torch.Tensor, backend: str | None) -> torch.Tensor:
    """``W^T weights``, fp32 [D], of W [F, D] and fp32 weights [F], by the decode kernel.

    The latents are split over up to 64 rows of codes, so that threads share the work and the order
    of the sum does not depend on their number.
    """
    n_latents = W.shape[0]
    parts = min(64, n_latents)
    width = -(-n_latents // parts)
    latents = torch.arange(parts * width, dtype=torch.int32, device=W.device)
    if parts * width > n_latents:
        latents = latents.clamp_(max=n_latents - 1)
        weights = pad(weights, (0, parts * width - n_latents))
    shape = (parts, width)
    partial: torch.Tensor = decode(
        weights.view(shape), latents.view(shape), W, None, None, backend=backend
    )
    return partial.sum(0)


def _one_entry_each(coef: torch.Tensor) -> tuple[LatentOrder, torch.Tensor]:
    """An entry of one token for every latent whose coefficient is not 0, and all entries' latents.

    Entry f is latent f's.
    """
    live = coef != 0
    offsets = pad(live.cumsum(0), (1, 0)).to(torch.int32)
    entries = (~live).to(torch.int8).argsort(stable=True).to(torch.int32)
    order = LatentOrder(offsets, entries, torch.zeros_like(entries))
    return order, torch.arange(len(coef), dtype=torch.int32, device=coef.device)


def _decoder_terms(
    order: LatentOrder, indices: torch.Tensor, decoded: list[_Decoded], context: Context
) -> list[Term]:
    if context.prefixes is not None:
        # Residual rows are [G * B, width]; a latent reads those of its own group.
        order = order.by_group(indices, context.prefixes.ends, context.n_tokens)
    return [order.term(d.factor * d.values, d.residual.flatten(0, -2)) for d in decoded]
