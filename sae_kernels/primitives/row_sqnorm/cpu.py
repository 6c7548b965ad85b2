"""row_sqnorm on the host kernels: the kernel of the update, stopped before Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.primitives.row_update.cpu import launch
from sae_kernels.primitives.rows import HYPER
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    from sae_kernels.primitives.terms import Gradient


def run(
    param: torch.Tensor, gradient: Gradient, _high: torch.Tensor | None, norm: str, slices: int
) -> torch.Tensor:
    """Runs the kernel (never for halves: there is no host kernel for int16)."""
    out = param.new_empty(param.shape[0])
    hyper = torch.ones(len(HYPER), dtype=torch.float64)
    launch((packed(param), None, None, None), gradient, hyper, (0, 0, 0), norm, slices, False, out)
    return out
