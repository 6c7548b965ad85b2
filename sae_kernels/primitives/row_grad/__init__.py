"""A dense weight gradient from its terms, for those who want gradients as tensors."""

from collections.abc import Sequence

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result
from sae_kernels.primitives.terms import Gradient, Term


@primitive(decided_by="terms_coef")
def row_grad(
    terms: Sequence[Term],
    n_latents: int,
    width: int,
    *,
    dtype: torch.dtype | None = None,
    W: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds up the terms of a weight gradient; with ``W``, multiplies its rows with the source's.

    A decoder's gradient reads the upstream rows of each latent's entries, and so does that of the
    codes: one visit to a latent serves both, ``products[e] = <W[f], source[row]>`` for each entry e
    of latent f. There is one term then, it has a source, and an entry whose coefficient is 0 adds
    nothing to the gradient, whatever its row of the source holds.

    Args:
        terms: at least one.
        n_latents: F, rows of the gradient.
        width: columns of the gradient.
        dtype: of the gradient, to which its sums are rounded once; default: the dtype of the first
            term's coefficients, in which they are summed.
        W: [F, width] of any operand dtype, or None.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        The gradient [F, width], and the products [N] in the dtype of the coefficients, 0 for
        entries that no latent lists; [0] without W.
    """
    summed = terms[0].coef.dtype
    Gradient(terms).check(n_latents, width, summed)
    if W is not None:
        source = terms[0].source
        if len(terms) != 1 or source is None:
            raise ValueError(f"W: expected one term with a source, got {len(terms)} terms")
        checks.shape("W", W, [n_latents, width], "a row per latent, as wide as the gradient")
        checks.dtype("W", W, checks.OPERAND_DTYPES)
        checks.same_device(source=source, W=W)
    n_products = 0 if W is None else terms[0].coef.shape[0]
    return (
        result([n_latents, width], summed if dtype is None else dtype),
        result([n_products], summed),
    )
