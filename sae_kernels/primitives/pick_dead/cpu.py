"""pick_dead on the CPU in torch, which may ask how many are dead: nothing has to wait."""

from __future__ import annotations

import torch


def run(since_fired: torch.Tensor, after: int, at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the dead latents only, and only when there are too many."""
    dead = (since_fired >= after).nonzero().flatten()
    if dead.numel() > at_most:
        order = since_fired[dead].sort(descending=True, stable=True).indices
        dead = dead[order[:at_most]].sort().values
    latents = since_fired.new_full((min(at_most, since_fired.shape[0]),), -1, dtype=torch.int32)
    if dead.numel():
        latents[: dead.numel()] = dead
    return latents, torch.tensor(dead.numel(), dtype=torch.int32)
