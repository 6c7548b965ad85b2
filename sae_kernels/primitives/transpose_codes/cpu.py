"""transpose_codes on the host kernels."""

from __future__ import annotations

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.tensors import packed


def run(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/transpose_codes.cpp."""
    alive = [packed(t) for t in (indices, values, row_ids)]
    n, threads = indices.numel(), cpu.threads()
    offsets = indices.new_empty(n_latents + 1)
    made = indices.new_empty if values is None else indices.new_zeros  # what is dropped stays zero
    entries, rows = made(n), made(n)
    workspace = indices.new_empty(threads * n_latents)
    in_range = cpu.module().transpose_codes(
        cpu.isa(),
        cpu.code(torch.float32 if values is None else values.dtype),
        *(cpu.address(t) for t in alive),
        cpu.address(offsets),
        cpu.address(entries),
        cpu.address(rows),
        cpu.address(workspace),
        n,
        n_latents,
        1 if row_ids is not None else max(1, indices.shape[1]),
        values is not None,
        threads,
    )
    if not in_range:
        checks.latents_in_range(indices, n_latents)
    return offsets, entries, rows
