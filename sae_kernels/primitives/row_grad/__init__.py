"""row_grad: a dense weight gradient from its parts, for those who want gradients as tensors.

Only the terms of a :class:`~sae_kernels.primitives.terms.Gradient` are added up (a plain autograd
user has no others); the result is in the dtype of the coefficients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.primitives.operator import Operator
from sae_kernels.primitives.terms import SCHEMA, Gradient, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def _check(coef: torch.Tensor, *arguments: Any) -> None:
    *columns, n_latents, width = arguments
    Gradient.from_columns(*columns).check(n_latents, width, coef.dtype)


def _fake(coef: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *_, n_latents, width = arguments
    return coef.new_empty((n_latents, width))


_operator = Operator(
    f"row_grad(Tensor coef, {SCHEMA}, SymInt n_latents, SymInt width, str backend) -> Tensor",
    _check,
    _fake,
)


def row_grad(
    terms: Sequence[Term], n_latents: int, width: int, *, backend: str | None = None
) -> torch.Tensor:
    """The [n_latents, width] gradient that at least one term adds up to."""
    gradient = Gradient(terms)
    result: torch.Tensor = _operator(
        terms[0].coef, *gradient.columns(), n_latents, width, backend=backend
    )
    return result
