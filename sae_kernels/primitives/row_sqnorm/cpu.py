"""row_sqnorm on the host kernels: row_update's kernel, stopped before Adam."""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.primitives.row_update import HYPER
from sae_kernels.primitives.row_update.cpu import launch
from sae_kernels.primitives.terms import Gradient
from sae_kernels.tensors import packed


def run(param: torch.Tensor, _high: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
    """Runs csrc/cpu/row_update.cpp (never for halves: there is no host kernel for int16)."""
    *columns, norm, slices = arguments
    gradient = Gradient.from_columns(*columns)
    out = param.new_empty(param.shape[0])
    hyper = torch.ones(len(HYPER), dtype=torch.float64)
    row = (packed(param), None, None, None)
    launch(row, gradient, hyper, (0.0, 0.0, 0.0), norm, slices, False, out)
    return out
