"""A dense weight gradient from its terms, for those who want gradients as tensors."""

from collections.abc import Sequence

import torch

from sae_kernels.primitives.operator import primitive, result
from sae_kernels.primitives.terms import Gradient, Term


@primitive(decided_by="terms_coef")
def row_grad(
    terms: Sequence[Term], n_latents: int, width: int, *, backend: str | None = None
) -> torch.Tensor:
    """Adds up the terms of a weight gradient.

    Args:
        terms: at least one.
        n_latents: F, rows of the gradient.
        width: columns of the gradient.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        The gradient [F, width] in the dtype of the first term's coefficients.
    """
    dtype = terms[0].coef.dtype
    Gradient(terms).check(n_latents, width, dtype)
    return result([n_latents, width], dtype)
