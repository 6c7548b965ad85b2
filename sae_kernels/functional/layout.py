"""A warning about weights that every call has to copy."""

from __future__ import annotations

import warnings

import torch

_warned: set[str] = set()


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
