"""row_grad on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.backends import cpu
from sae_kernels.primitives.terms import listed_entries, without_zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from sae_kernels.primitives.terms import Term

_WIDENED_BYTES = 4 << 20  # of W in the dtype of the sums at a time, so that they stay in cache


def run(
    terms: Sequence[Term],
    n_latents: int,
    width: int,
    dtype: torch.dtype | None = None,
    W: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the host kernel, each latent's row on one thread."""
    coef = terms[0].coef
    products = coef.new_zeros(0 if W is None else coef.shape[0])
    if W is not None:
        _multiply(terms[0], W, products)
        if bool((coef == 0).any()):
            terms = [without_zeros(terms[0])]
    tuples = cpu.packed_terms(terms, coef.dtype)
    out = coef.new_empty((n_latents, width))
    cpu.run("row_grad", cpu.code(coef.dtype), tuples, len(tuples), n_latents, width, out)
    return out if dtype is None else out.to(dtype), products


def _multiply(term: Term, W: torch.Tensor, products: torch.Tensor) -> None:
    """Fills ``products`` by code_grad's kernel, latents in place of tokens, rows in theirs."""
    listed, _ = listed_entries(term)
    (tuple_,) = cpu.packed_terms([term], products.dtype)
    offsets, entries, rows, _, source, source_dtype = tuple_
    out = products.new_empty(products.shape)  # in latent order
    slab = max(1, _WIDENED_BYTES // (W.shape[1] * products.element_size()))
    for some in (slice(first, first + slab) for first in range(0, W.shape[0], slab)):
        own = W[some].to(products.dtype).contiguous()
        ends = offsets[some.start : some.stop + 1]
        sizes = (own.shape[0], 1, own.shape[1], source.shape[0], 1)
        cpu.run("code_grad", source_dtype, own, rows, ends, source, None, out, *sizes)
    products[entries[listed].long()] = out[listed]
