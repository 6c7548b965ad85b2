"""What the tests of the dense oracles share: small parameters and ways to compare."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sae_kernels.testing import DenseSpec, assert_within, gamma

inf, nan = math.inf, math.nan


def t(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def close(actual: Tensor, *expected: Any) -> None:
    """Equal but for the roundings of the few operations of a small example."""
    want = t(*expected)
    assert_within("values", actual, want, gamma(30, torch.float64) * (1 + want.abs()))


def identity(n: int, **more: Tensor) -> dict[str, Tensor]:
    """Parameters that make h = x and y_hat = f."""
    eye, zero = torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    plain = {"W_enc": eye, "b_enc": zero, "W_dec": eye.clone(), "b_dec": zero.clone()} | more
    return {name: value.clone().requires_grad_() for name, value in plain.items()}


def raw(selection: Any, **settings: Any) -> DenseSpec:
    return DenseSpec(selection, subtract_b_dec=False, **settings)


def kept(codes: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in codes]


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def randoms(d_in: int, F: int, d_out: int | None = None) -> dict[str, Tensor]:
    d_out = d_in if d_out is None else d_out
    shapes = {"W_enc": (F, d_in), "b_enc": (F,), "W_dec": (F, d_out), "b_dec": (d_out,)}
    return {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
