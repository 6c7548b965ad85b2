"""transpose_codes in plain torch: the specification."""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks


def run(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorts the kept entries by latent; the sort is stable."""
    checks.latents_in_range(indices, n_latents)
    flat = indices.flatten().long()
    kept = torch.arange(flat.numel(), device=flat.device)
    if values is not None:
        kept = kept[values.flatten() != 0]
    order = kept[flat[kept].argsort(stable=True)]
    offsets = indices.new_zeros(n_latents + 1)
    offsets[1:] = flat[kept].bincount(minlength=n_latents).cumsum(0)
    entries = indices.new_zeros(flat.numel())
    rows = indices.new_zeros(flat.numel())
    entries[: order.numel()] = order
    rows[: order.numel()] = (
        order // indices.shape[1] if row_ids is None else row_ids.flatten()[order]
    )
    return offsets, entries, rows
