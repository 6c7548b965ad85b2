"""The penalties that make codes sparse, written over the kept entries alone.

A penalty is one function of a tensor of codes and the context of the batch; its name is a value of
the setting ``sparsity``. What it gives is added up and divided by the number of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Context


def sparsity_penalty(codes: SparseCodes, context: Context) -> torch.Tensor:
    """Mean over the tokens of the penalty that the settings name, without its coefficient."""
    sae, objective = context.sae, context.objective
    values = codes.values
    if objective.sparsity_norm_weighted:
        weights = sae.latent_norms(context.norms)
        values = values * functional.gather_by_latent(weights, codes, backend=sae.backend)
    return total(PENALTIES[objective.sparsity](values, context)) / context.n_tokens


def total(entries: torch.Tensor) -> torch.Tensor:
    """The sum in fp32 at least: a dense tile's entries may be bf16."""
    return entries.sum(dtype=torch.promote_types(entries.dtype, torch.float32))


def l1(codes: torch.Tensor, context: Context) -> torch.Tensor:
    """The codes themselves, which are not negative."""
    return codes


def lp(codes: torch.Tensor, context: Context) -> torch.Tensor:
    """``codes^p``, p falling over the run (p-annealing, arXiv 2408.00113)."""
    context.observe(codes)
    return powers(codes, context.p)


def tanh(codes: torch.Tensor, context: Context) -> torch.Tensor:
    """``tanh(tanh_scale * codes)`` (Anthropic, January 2025)."""
    return torch.tanh(context.objective.tanh_scale * codes)


def powers(codes: torch.Tensor, p: float) -> torch.Tensor:
    """``codes^p``; at 0 the derivative is 0, where that of a power below 1 is infinite."""
    live = codes != 0
    return torch.where(live, torch.where(live, codes, 1) ** p, 0)


PENALTIES: dict[str, Callable[[torch.Tensor, Context], torch.Tensor]] = {
    "l1": l1,
    "lp": lp,
    "tanh": tanh,
}
