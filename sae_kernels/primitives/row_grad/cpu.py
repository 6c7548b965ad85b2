"""row_grad on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from sae_kernels.primitives.terms import Term


def run(terms: Sequence[Term], n_latents: int, width: int) -> torch.Tensor:
    """Runs the host kernel, each latent's row on one thread."""
    coef = terms[0].coef
    tuples = cpu.packed_terms(terms, coef.dtype)
    out = coef.new_empty((n_latents, width))
    cpu.run("row_grad", cpu.code(coef.dtype), tuples, len(tuples), n_latents, width, out)
    return out
