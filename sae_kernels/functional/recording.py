"""Checks that every differentiable function makes: autograd, autocast, the layout of weights."""

from __future__ import annotations

import warnings

import torch

_warned: set[str] = set()


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


def warn_of_copies(name: str, weights: torch.Tensor, stacklevel: int) -> None:
    """Warns once per process and argument about a matrix whose rows are not contiguous.

    The kernels read [F, D] row by row, so a transposed view of a [D, F] tensor is copied at every
    call.

    Args:
        name: the caller's argument.
        weights: [F, D].
        stacklevel: of the caller's frame, counted from this function's, as `warnings.warn` counts.
    """
    if torch.compiler.is_compiling() or name in _warned:
        return
    _warned.add(name)
    theirs = "W.T" if weights.t().is_contiguous() else "W"
    warnings.warn(
        f"{name}: expected {list(weights.shape)} row after row (latents first), got a view with "
        f"strides {list(weights.stride())}, which is copied at every call; keep a copy and give "
        f"that: {name} = {theirs}.contiguous()",
        UserWarning,
        stacklevel=stacklevel,
    )
