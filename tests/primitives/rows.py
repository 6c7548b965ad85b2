"""What the tests of row_update share: rows, layouts and gradients of every part."""

from __future__ import annotations

import pytest
import torch
from refusals import needs

from sae_kernels import gpu
from sae_kernels.codes import LatentOrder
from sae_kernels.primitives.row_update import AdamMatrix, halves
from sae_kernels.primitives.terms import Gradient, Term
from sae_kernels.primitives.transpose_codes import transpose_codes
from sae_kernels.testing import (
    oracles,
)

# The others run where the host cannot look at latents without waiting for the device.
CHECKED_ON_THE_HOST = ("reference", "cpu")
F, WIDTH = 23, 36
COPIES = (torch.bfloat16, torch.float16)
HYPER = torch.tensor([0.01, 0.5, 1 - 0.9**3, 1 - 0.999**3, 0.0, 3.0], dtype=torch.float64)
# How a matrix lies in memory: in fp32, with bf16 moments, in halves, and both.
LAYOUTS = ("fp32", "moments", "split", "moments-split")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
ULP = 2.0**-7  # of bf16: what stochastic rounding is off by, at most


def make_row(
    high: torch.dtype, copy: torch.dtype | None, slices: int = 1, width: int = WIDTH
) -> AdamMatrix:
    """Unit slices and moments as after some steps, v well away from zero; a poisoned copy."""
    param = torch.randn(F, width, dtype=high).unflatten(1, (slices, -1))
    param = (param / param.norm(dim=-1, keepdim=True)).flatten(1)
    m, v = torch.randn(F, width, dtype=high), torch.rand(F, width, dtype=high) + 0.1
    return AdamMatrix(
        param, m, v, None if copy is None else torch.full_like(param, torch.nan).to(copy)
    )


def laid_out(row: AdamMatrix, layout: str) -> AdamMatrix:
    """The same row in another layout."""
    param, m, v, copy = clone(row)
    if "moments" in layout:
        m, v = m.to(torch.bfloat16), v.to(torch.bfloat16)
    if "split" in layout:
        copy, param = halves.split(param)
    return AdamMatrix(param, m, v, copy)


def whole(row: AdamMatrix) -> torch.Tensor:
    """The weights in fp32, from whatever layout."""
    split = row.param.dtype == torch.int16 and row.copy is not None
    return halves.joined(row.copy, row.param) if split else row.param


def clone(row: AdamMatrix) -> AdamMatrix:
    """A row update works in place."""
    return AdamMatrix(*(None if t is None else t.clone() for t in row))  # type: ignore[arg-type]


def takes(row: AdamMatrix, gradient: Gradient, backend: str) -> None:
    """Skips a test of such an update where the backend has no kernel for it."""
    arguments = (row, gradient, HYPER, (0.9, 0.999), 1e-8, "none", 1, False)
    needs("row_update", row.param.dtype, backend, arguments)


def make_term(
    high: torch.dtype, source: torch.dtype | None, width: int
) -> tuple[Term, torch.Tensor, torch.Tensor]:
    """A term of 12 tokens on latents below 15, its dense gradient and the absolute terms of it."""
    indices = torch.rand(12, 15).argsort(dim=1)[:, :4].to(torch.int32)
    coef = torch.randn(12, 4, dtype=high)
    rows = torch.randn(12, width).to(source) if source else None
    order = LatentOrder(*transpose_codes(indices, None, None, F, backend="reference"))
    dense = oracles.dense_codes(coef, indices, F)
    source_rows = (torch.ones(12, width) if rows is None else rows).double()
    return order.term(coef, rows), dense.T @ source_rows, dense.abs().T @ source_rows.abs()


def make_gradient(
    high: torch.dtype, row: AdamMatrix, parts: int | None = None
) -> tuple[Gradient, torch.Tensor, torch.Tensor]:
    """Every part of a gradient at once; its sum in fp64 and the absolute terms of it.

    ``parts`` of a row have a penalty each; None stands for one coefficient a row.
    """
    width = row.param.shape[1]
    sources = (torch.float32, torch.bfloat16, None) if high == torch.float32 else (high, None)
    made = [make_term(high, source, width) for source in sources]
    row_coef = torch.randn(F, *([] if parts is None else [parts]), dtype=high)
    row_coef[::2] = 0
    dense = torch.randn(4, width, dtype=high)
    dense[1] = torch.nan  # an unused row may hold anything
    latents = torch.tensor([20, -1, 3, 0], dtype=torch.int32)
    penalty = oracles.row_penalty(row.param, row_coef)
    grad = sum((dense for _, dense, _ in made), penalty)
    magnitude = sum((terms for _, _, terms in made), penalty.abs())
    grad[[20, 3, 0]] += dense[[0, 2, 3]].double()
    magnitude[[20, 3, 0]] += dense[[0, 2, 3]].abs().double()
    return Gradient([term for term, _, _ in made], row_coef, dense, latents), grad, magnitude


def upper_halves() -> torch.Tensor:
    """The upper 16 bits of every fp32 number; of an eighth of them in Triton's interpreter."""
    if gpu.interpreted():
        eighth = torch.arange(1 << 13)
        return eighth * 8 + eighth % 8
    return torch.arange(1 << 16)
