"""The CUDA C++ kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CUDA C++ kernels cannot run a call, or None."""
    return "not built"
