"""What every kernel asks of its tensors."""

from __future__ import annotations

from typing import overload

import torch

Ragged = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # values, latents, offsets


@overload
def packed(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def packed(tensor: None) -> None: ...
def packed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor in row-major order, what every kernel takes; None stays None."""
    return None if tensor is None else tensor.contiguous()


def kept_entries(codes: Ragged, kept: torch.Tensor) -> Ragged:
    """Values, latents and offsets of ragged codes without the entries that are not kept."""
    values, indices, offsets = codes
    entries = kept.nonzero()[:, 0]
    if entries.numel() == kept.numel():
        return codes
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0)).to(torch.int32)
    return values[entries], indices[entries], before[offsets.long()]


def rounded_down(exact: torch.Tensor) -> torch.Tensor:
    """fp64 thresholds in fp32: every fp32 number above the one is above the other."""
    near = exact.float()
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return torch.where(near.double() > exact, below, near)
