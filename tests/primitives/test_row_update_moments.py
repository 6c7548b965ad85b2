"""The moments after row_update against fp64: what is derived from the betas is derived in fp64.

1 - 0.999 of an fp32 0.999 is 1.3e-5 too small, and so is every second moment. A gradient that is
known exactly and moments of zero leave no other term to hide that behind.
"""

from __future__ import annotations

import math

import pytest
import torch
from refusals import needs

from sae_kernels.primitives.row_update import AdamMatrix, row_update
from sae_kernels.primitives.terms import Gradient
from sae_kernels.testing import assert_within, rounding

PRIMITIVES = ("row_update",)
F, WIDTH = 23, 36
BETAS = [(0.9, 0.999), (0.5, 0.95), (0.99, 0.9999), (0.0, 0.99999)]


def hyper_of(betas: tuple[float, float], t: int) -> torch.Tensor:
    """Step t at a learning rate of 0.01, without clipping."""
    corrections = [1 - beta**t for beta in betas]
    return torch.tensor([0.01, 1.0, *corrections, 0.0, t], dtype=torch.float64)


def update(row: AdamMatrix, grad: torch.Tensor, betas: tuple[float, float], backend: str) -> None:
    """The first step, by a gradient that is given as it is."""
    latents = torch.arange(len(grad), dtype=torch.int32)
    arguments = (row, Gradient(dense=grad, dense_latents=latents), hyper_of(betas, 1))
    needs("row_update", row.param.dtype, backend, (*arguments, betas, 1e-8, "none", 1, False))
    row_update(*arguments, betas=betas, backend=backend)


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("high", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("width", [WIDTH, 1], ids=["matrix", "vector"])
def test_first_moments_and_first_second_moments(
    width: int, high: torch.dtype, betas: tuple[float, float], backend: str
) -> None:
    grad = torch.randn(F, width, dtype=high)
    row = AdamMatrix(*(torch.zeros(F, width, dtype=high) for _ in range(3)))
    update(row, grad, betas, backend)
    exact, (beta1, beta2) = grad.double(), betas
    # The constant and the product with it; for v the square as well. Both are added to zero.
    m, v = (1 - beta1) * exact, (1 - beta2) * exact.square()
    assert_within("m", row.m, m, rounding(2, m.abs(), high))
    assert_within("v", row.v, v, rounding(3, v, high))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_bf16_moments_are_right_on_average(split: bool, backend: str) -> None:
    n, betas, g = 512, (0.99, 0.9999), 1.37
    param = torch.zeros(n, n, dtype=torch.int16 if split else torch.float32)
    copy = torch.ones(n, n, dtype=torch.bfloat16) if split else None
    m, v = (torch.zeros(n, n, dtype=torch.bfloat16) for _ in range(2))
    row = AdamMatrix(param, m, v, copy)
    grad = torch.full((n, n), g)
    update(row, grad, betas, backend)
    exact = float(grad[0, 0].double())
    for name, got, want in (("m", m, (1 - 0.99) * exact), ("v", v, (1 - 0.9999) * exact**2)):
        ulp = 2.0 ** (math.frexp(want)[1] - 8)
        # Each is one of the two neighbours, drawn independently (Hoeffding, chance 1e-9), in steps
        # of 2^-16 of them; and the arithmetic before it, in fp32.
        chance = ulp * math.sqrt(math.log(2e9) / (2 * n * n))
        budget = chance + ulp / 2**16 + float(rounding(3, torch.tensor(want), torch.float32))
        assert budget < 1e-4 * want, "small enough to tell a beta in fp32 from one in fp64"
        assert_within(name, got.double().mean(), torch.tensor(want).double(), budget)
