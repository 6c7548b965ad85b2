"""row_grad on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.backends import cpu
from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    import torch


def run(coef: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Runs csrc/cpu/row_update.cpp."""
    *columns, n_latents, width = arguments
    tuples, _alive = cpu.packed_terms(Gradient.from_columns(*columns).terms, coef.dtype)
    out = coef.new_empty((n_latents, width))
    cpu.module().row_grad(
        cpu.isa(), cpu.code(coef.dtype), tuples, cpu.address(out), n_latents, width, cpu.threads()
    )
    return out
