"""What every kernel asks of its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import torch


@overload
def packed(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def packed(tensor: None) -> None: ...
def packed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor in row-major order, what every kernel takes; None stays None."""
    return None if tensor is None else tensor.contiguous()
