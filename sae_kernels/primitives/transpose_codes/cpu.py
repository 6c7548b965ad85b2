"""transpose_codes on the host kernels."""

from __future__ import annotations

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.primitives.tensors import packed


def run(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/transpose_codes.cpp."""
    alive = [packed(t) for t in (indices, values, row_ids)]
    n = indices.numel()
    offsets = indices.new_empty(n_latents + 1)
    made = indices.new_empty if values is None else indices.new_zeros  # what is dropped stays zero
    entries, rows = made(n), made(n)
    workspace = indices.new_empty(cpu.threads() * n_latents)
    in_range = cpu.run(
        "transpose_codes",
        cpu.code(torch.float32 if values is None else values.dtype),
        *alive,
        offsets,
        entries,
        rows,
        workspace,
        n,
        n_latents,
        1 if row_ids is not None else max(1, indices.shape[1]),
        values is not None,
    )
    if not in_range:
        checks.latents_in_range(indices, n_latents)
    return offsets, entries, rows
