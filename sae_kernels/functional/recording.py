"""Autocast and double-backward handling, shared by all differentiable functions."""

from __future__ import annotations

import torch


def autocast_dtype(like: torch.Tensor) -> torch.dtype | None:
    """The autocast dtype for products of this tensor, or None outside autocast."""
    device = like.device.type
    if like.dtype == torch.float64 or device == "meta":
        return None  # autocast ignores fp64 and does not support the meta device
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def refuse_double_backward() -> None:
    """Raises RuntimeError in a backward pass with ``create_graph=True``."""
    # once_differentiable is not enough: for a linear loss it silently returns constants.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "sae_kernels has first-order gradients only: expected a backward pass without "
            "create_graph=True"
        )
