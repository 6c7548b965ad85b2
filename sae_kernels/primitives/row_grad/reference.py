"""row_grad in plain torch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives.terms import listed_entries, without_zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from sae_kernels.primitives.terms import Term


def run(
    terms: Sequence[Term],
    n_latents: int,
    width: int,
    dtype: torch.dtype | None = None,
    W: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds every entry's weighted row to its latent's."""
    out = terms[0].coef.new_zeros((n_latents, width))
    products = out.new_zeros(0 if W is None else terms[0].coef.shape[0])
    if W is not None:
        (term,) = terms
        assert term.source is not None
        listed, latents = listed_entries(term)
        own, rows = (t.to(out.dtype) for t in (W, term.source))
        each = own[latents] * rows[term.rows[listed].long()]
        products[term.entries[listed].long()] = each.sum(1)
        terms = [without_zeros(term)]
    for term in terms:
        add_term(out, term)
    return out.to(dtype or out.dtype), products


def add_term(out: torch.Tensor, term: Term) -> None:
    """Adds one term to an [F, width] gradient, in place."""
    listed, latents = listed_entries(term)
    rows = term.coef.flatten()[term.entries[listed].long()].to(out.dtype)[:, None]
    if term.source is not None:
        rows = rows * term.source[term.rows[listed].long()].to(out.dtype)
    out.index_add_(0, latents, rows.expand(len(latents), out.shape[1]))
