"""row_sqnorm on the host kernels: the kernel of the update, stopped before Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.primitives.row_update.cpu import launch
from sae_kernels.primitives.rows import HYPER, arithmetic_dtype
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    from sae_kernels.primitives.terms import Gradient


def run(
    param: torch.Tensor, gradient: Gradient, high: torch.Tensor | None, norm: str, slices: int
) -> torch.Tensor:
    """Runs csrc/cpu/row_update.cpp."""
    out = param.new_empty(param.shape[0], dtype=arithmetic_dtype(param))
    hyper = torch.ones(len(HYPER), dtype=torch.float64)
    matrix = (packed(param), None, None, packed(high))
    launch(matrix, gradient, hyper, (0, 0, 0), norm, slices, False, out)
    return out
