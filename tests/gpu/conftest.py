"""Tests that only a GPU can decide; elsewhere they are skipped and say so.

They put their tensors on the GPU themselves, so they run as plain pytest does, without
SAE_TEST_DEVICE.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that this build of torch can use")
    return torch.device("cuda", 0)
