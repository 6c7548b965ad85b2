"""row_update on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.primitives.rows import NORMS, arithmetic_dtype
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.primitives.row_update import AdamMatrix
    from sae_kernels.primitives.terms import Gradient


def run(
    matrix: AdamMatrix,
    gradient: Gradient,
    hyper: torch.Tensor,
    betas: Sequence[float],
    eps: float,
    norm: str,
    slices: int,
    lazy: bool,
) -> None:
    """Runs csrc/cpu/row_update.cpp."""
    launch(tuple(matrix), gradient, hyper, (*betas, eps), norm, slices, lazy)
    torch.autograd.graph.increment_version([t for t in matrix if t is not None])


def launch(
    matrix: tuple[torch.Tensor | None, ...],
    gradient: Gradient,
    hyper: torch.Tensor,
    adam: tuple[float, ...],
    norm: str,
    slices: int,
    lazy: bool,
    sqnorm: torch.Tensor | None = None,
) -> None:
    """Calls the kernel: an update, or with ``sqnorm`` only the squared gradient norms.

    Args:
        matrix: the four parts of an AdamMatrix; the norms need neither m and v nor a whole
            param's copy.
        gradient, hyper, norm, slices, lazy: as of the update.
        adam: both betas and eps.
        sqnorm: [F] in the dtype of the arithmetic, for the norms.
    """
    param, m, _, copy = matrix
    assert param is not None
    dtype = arithmetic_dtype(param)
    tuples = cpu.packed_terms(gradient.terms, dtype)
    row_coef, dense = packed(gradient.row_coef), packed(gradient.dense)
    slot = _slots(gradient.dense_latents, param.shape[0])
    workspace = param.new_empty((cpu.threads(), 2, param.shape[1]), dtype=dtype)
    cpu.run(
        "row_update",
        cpu.code(param.dtype),
        cpu.code(dtype if m is None else m.dtype),
        cpu.code(torch.bfloat16 if copy is None else copy.dtype),
        *matrix,
        tuples,
        len(tuples),
        *param.shape,
        row_coef,
        dense,
        slot,
        gradient.row_parts,
        packed(hyper),
        *adam,
        NORMS.index(norm),
        slices,
        lazy,
        sqnorm,
        workspace,
    )


def _slots(dense_latents: torch.Tensor | None, n_latents: int) -> torch.Tensor | None:
    """The row of the dense block that belongs to each latent, or -1."""
    if dense_latents is None:
        return None
    rows = torch.arange(dense_latents.numel(), dtype=torch.int32)
    if len(rows) == n_latents and torch.equal(rows, dense_latents):
        return rows  # all latents in order, as of a whole gradient
    checks.latents_in_range(dense_latents, n_latents, "dense_latents", lowest=-1)
    slot = dense_latents.new_full((n_latents + 1,), -1)
    slot[dense_latents.long()] = rows  # -1 lands in the extra last place
    return slot
