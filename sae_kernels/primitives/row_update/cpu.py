"""row_update on the host kernels."""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.primitives.row_update import NORMS
from sae_kernels.primitives.terms import Gradient
from sae_kernels.tensors import packed


def refuses(param: torch.Tensor, m: torch.Tensor, *_: Any) -> str | None:
    """Why the host kernels cannot run this call, or None."""
    if m.dtype == param.dtype:
        return None
    return f"no kernel for m and v in {m.dtype} beside {param.dtype}, only for both in one dtype"


def run(
    param: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    copy: torch.Tensor | None,
    *arguments: Any,
) -> None:
    """Runs csrc/cpu/row_update.cpp."""
    *columns, hyper, beta1, beta2, eps, norm, slices, lazy = arguments
    updated = [t for t in (param, m, v, copy) if t is not None]
    launch(
        (param, m, v, copy),
        Gradient.from_columns(*columns),
        hyper,
        (beta1, beta2, eps),
        norm,
        slices,
        lazy,
        None,
    )
    torch.autograd.graph.increment_version(updated)


def launch(
    row: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    gradient: Gradient,
    hyper: torch.Tensor,
    adam: tuple[float, float, float],
    norm: str,
    slices: int,
    lazy: bool,
    sqnorm: torch.Tensor | None,
) -> None:
    """Calls the kernel: an update, or with ``sqnorm`` only the squared gradient norms."""
    param, m, v, copy = row
    tuples, _alive = cpu.packed_terms(gradient.terms, param.dtype)
    row_coef, dense = packed(gradient.row_coef), packed(gradient.dense)
    slot = _slots(gradient.dense_latents, param.shape[0])
    hyper = packed(hyper)
    workspace = param.new_empty((cpu.threads(), param.shape[1]))
    cpu.module().row_update(
        cpu.isa(),
        cpu.code(param.dtype),
        cpu.code(torch.bfloat16 if copy is None else copy.dtype),
        *(cpu.address(t) for t in (param, m, v, copy)),
        tuples,
        *param.shape,
        *(cpu.address(t) for t in (row_coef, dense, slot)),
        gradient.row_parts,
        cpu.address(hyper),
        *adam,
        NORMS.index(norm),
        slices,
        lazy,
        cpu.address(sqnorm),
        cpu.address(workspace),
        cpu.threads(),
    )


def _slots(dense_latents: torch.Tensor | None, n_latents: int) -> torch.Tensor | None:
    """Per latent its row of the dense block, or -1."""
    if dense_latents is None:
        return None
    checks.latents_in_range(dense_latents, n_latents, "dense_latents", lowest=-1)
    slot = dense_latents.new_full((n_latents + 1,), -1)
    rows = torch.arange(dense_latents.numel(), dtype=torch.int32)
    slot[dense_latents.long()] = rows  # -1 lands in the extra last place
    return slot
