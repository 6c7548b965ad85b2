"""A dense weight gradient from its terms, for those who want gradients as tensors."""

from collections.abc import Sequence

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result
from sae_kernels.primitives.terms import Gradient, Term


@primitive(decided_by="terms_coef", writes=("dots",))
def row_grad(
    terms: Sequence[Term],
    n_latents: int,
    width: int,
    *,
    dtype: torch.dtype | None = None,
    W: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Adds up the terms of a weight gradient; with ``W``, multiplies its rows with the source's.

    A decoder's gradient reads the upstream rows of each latent's entries, and so does that of the
    codes: one visit to a latent serves both, ``dots[e] = <W[f], source[row]>`` for each entry e of
    latent f. There is one term then, it has a source, and an entry whose coefficient is 0 adds
    nothing to the gradient, whatever its row of the source holds.

    Args:
        terms: at least one.
        n_latents: F, rows of the gradient.
        width: columns of the gradient.
        dtype: of the gradient, to which its sums are rounded once; default: the dtype of the first
            term's coefficients, in which they are summed.
        W: [F, width] of any operand dtype, or None.
        dots: [N] in the dtype of the coefficients, written; with W. Entries that no latent lists
            stay as they are.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        The gradient [F, width].
    """
    summed = terms[0].coef.dtype
    Gradient(terms).check(n_latents, width, summed)
    if (W is None) != (dots is None):
        raise ValueError("W and dots: expected both or neither, got one of them")
    if W is not None:
        source = terms[0].source
        if len(terms) != 1 or source is None:
            raise ValueError(f"W: expected one term with a source, got {len(terms)} terms")
        checks.shape("W", W, [n_latents, width], "a row per latent, as wide as the gradient")
        checks.dtype("W", W, checks.OPERAND_DTYPES)
        checks.shape("dots", dots, list(terms[0].coef.shape), "one per entry")
        checks.dtype("dots", dots, (summed,))
        checks.same_device(source=source, W=W, dots=dots)
    return result([n_latents, width], summed if dtype is None else dtype)
