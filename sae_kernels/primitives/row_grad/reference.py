"""row_grad in plain torch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.primitives.terms import Term


def run(terms: Sequence[Term], n_latents: int, width: int) -> torch.Tensor:
    """Adds every entry's weighted row to its latent's."""
    out = terms[0].coef.new_zeros((n_latents, width))
    for term in terms:
        add_term(out, term)
    return out


def add_term(out: torch.Tensor, term: Term) -> None:
    """Adds one term to an [F, width] gradient, in place."""
    first, last = int(term.offsets[0]), int(term.offsets[-1])
    latents = torch.arange(out.shape[0], device=out.device)
    latents = latents.repeat_interleave(term.offsets.diff().long())
    rows = term.coef.flatten()[term.entries[first:last].long()].to(out.dtype)[:, None]
    if term.source is not None:
        rows = rows * term.source[term.rows[first:last].long()].to(out.dtype)
    out.index_add_(0, latents, rows.expand(last - first, out.shape[1]))
