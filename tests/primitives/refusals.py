"""Skipping what a backend has no kernel for, in its own words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels import backends

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def needs(primitive: str, dtype: torch.dtype, backend: str, arguments: Sequence[Any] = ()) -> None:
    """Skips a test of calls, or of one call, that the backend refuses."""
    device = torch.get_default_device()
    reason = dict(backends.candidates(primitive, device, dtype, arguments))[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
