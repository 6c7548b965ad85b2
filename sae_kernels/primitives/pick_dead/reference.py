"""pick_dead in plain torch: the specification, padded as on a device."""

from __future__ import annotations

import torch


def run(since_fired: torch.Tensor, after: int, at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the counters; a stable sort keeps equal ones in latent order."""
    n_latents = since_fired.shape[0]
    order = since_fired.sort(descending=True, stable=True).indices[:at_most]
    dead = since_fired[order] >= after
    latents = torch.where(dead, order, n_latents).sort().values
    padded = torch.where(latents < n_latents, latents, -1)
    return padded.to(torch.int32), dead.sum(dtype=torch.int32)
