"""Autograd over entries: what both passes of FusedStep leave to it, and what they give back.

A pass knows the products in closed form. What an architecture and its penalty do to an entry is
left to autograd, which sees vectors of kept entries and of latents and nothing larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn import SparseAutoencoder

Tensors = dict[str, torch.Tensor]


class PassResult(NamedTuple):
    """Loss and gradients of a batch.

    Attributes:
        loss: scalar, without AuxK.
        error: scalar, the main reconstruction's squared error.
        residual: fp32 [B, output width], the main reconstruction less the target.
        gradients: of all parameters; b_dec's through the output alone.
        dh_sum: [F], dL/dh summed over the tokens; ``W_enc^T dh_sum`` is the gradient of x, summed.
        fired: int32 [F], how often each latent fired.
        n_kept: how many entries the encoder kept.
    """

    loss: torch.Tensor
    error: torch.Tensor
    residual: torch.Tensor
    gradients: dict[str, Gradient]
    dh_sum: torch.Tensor
    fired: torch.Tensor
    n_kept: int


def with_leaves(sae: SparseAutoencoder, pre: SparseCodes) -> tuple[SparseCodes, Tensors]:
    """Kept entries whose values are leaves, and by name all that autograd differentiates by.

    The leaves are the pre-activations "h", the vectors of latents (parameters, which are leaves
    already) and what the architecture adds.
    """
    added = {name: t.detach().requires_grad_() for name, t in sae.entry_leaves(pre).items()}
    h = pre.values.detach().requires_grad_()
    return sae.with_leaves(pre, added).with_values(h), {"h": h, **latent_vectors(sae), **added}


def latent_vectors(sae: SparseAutoencoder) -> Tensors:
    """The trained parameters that have a number for each latent, by name."""
    return {
        name: parameter
        for name, parameter in sae.named_parameters()
        if parameter.dim() == 1 and name not in sae.non_latent_vectors and parameter.requires_grad
    }


def entry_gradients(
    leaves: Tensors,
    outputs: list[tuple[torch.Tensor, torch.Tensor]],
    penalty: torch.Tensor | None,
) -> Tensors:
    """The gradients by the name of their leaf, those that there are; "h" always.

    Args:
        leaves: of :func:`with_leaves`, and those of the context.
        outputs: the values of each reconstruction and dL/dvalues.
        penalty: added to the loss, or None.
    """
    if penalty is not None:
        outputs = [*outputs, (penalty, torch.ones_like(penalty))]
    values, grads = zip(*[pair for pair in outputs if pair[0].requires_grad], strict=True)
    found = torch.autograd.grad(values, list(leaves.values()), grads, allow_unused=True)
    result = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    result.setdefault("h", torch.zeros_like(leaves["h"]))
    return result


def vector_gradients(
    sae: SparseAutoencoder, grads: Tensors, db_enc: Gradient
) -> dict[str, Gradient]:
    """The gradients of all vectors of latents, each a matrix of width 1.

    Args:
        sae: whose parameters.
        grads: of :func:`entry_gradients`.
        db_enc: b_enc's share as the bias of the encoder product, of terms alone.
    """
    result = {"b_enc": db_enc}
    for name in latent_vectors(sae):
        if name in grads:
            terms = result.get(name, Gradient()).terms
            result[name] = Gradient.whole(grads[name][:, None])._replace(terms=terms)
    return result
