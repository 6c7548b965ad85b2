"""What every differentiable function asks of autograd and autocast."""

from __future__ import annotations

import torch


def autocast_dtype(like: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast wants products of this tensor in, or None."""
    device = like.device.type
    if like.dtype == torch.float64 or device == "meta":
        return None  # autocast leaves fp64 alone everywhere and knows no meta device
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def refuse_double_backward() -> None:
    """Raises in a backward pass that is itself recorded."""
    # once_differentiable would hide this: under a linear loss it returns constant gradients.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "sae_kernels has first-order gradients only: expected a backward pass without "
            "create_graph=True"
        )
