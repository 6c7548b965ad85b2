"""Backend reference: the specification in plain torch, slow, on any device and in any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Always None: the reference can run every call."""
    return None
