"""LateTensor: computed once, when it is used, with the gradient of what it stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sae_kernels.integrations.late import LateTensor
from sae_kernels.integrations.patching import Ledger


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, requires_grad=True)
    return x, torch.randn(3, 4, generator=generator, requires_grad=True)


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x @ W


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad / 2


USES = {
    "sum": lambda h: h.sum(),
    "columns": lambda h: h[:, 1:3].square().sum(),
    "relu": lambda h: (h.relu() ** 2).mean(),
    "where": lambda h: torch.where(torch.arange(4) > 1, h, -torch.inf).topk(2).values.sum(),
    "function": lambda h: Halved.apply(h).square().sum(),
    "twice": lambda h: (h * h.detach()).sum() + h.exp().sum(),
}


@pytest.mark.parametrize("use", USES)
def test_its_values_and_gradients(use: str) -> None:
    x, W = inputs()
    expected = USES[use](x @ W)
    wanted = torch.autograd.grad(expected, (x, W))
    late = LateTensor.of((5, 4), lambda x, W: x @ W, x, W)
    found = USES[use](late)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, (x, W)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_it_is_computed_once_and_only_if_used() -> None:
    x, W = inputs()
    compute, ledger = Counted(), Ledger("test")
    late = LateTensor.of((5, 4), compute, x, W, ledger=ledger)
    assert (late.shape, late.dtype, late.dim(), late.numel()) == ((5, 4), torch.float32, 2, 20)
    assert late.requires_grad
    late.detach()
    assert (compute.calls, ledger.dense, late.computed) == (0, {}, False)
    assert repr(late) == "LateTensor(shape=(5, 4), computed=False)"
    late.sum()
    late.detach().max()
    copy.deepcopy(late)
    assert compute.calls == 1
    assert ledger.dense == {"pre-activations: sum": 1}


def test_it_is_not_computed_from_other_weights() -> None:
    x, W = inputs()
    late = LateTensor.of((5, 4), lambda x, W: x @ W, x, W)
    with torch.no_grad():
        W.add_(1)
    with pytest.raises(RuntimeError, match="pre-activations: expected to be read before"):
        late.sum()


def test_under_no_grad_it_has_none() -> None:
    x, W = inputs()
    with torch.no_grad():
        late = LateTensor.of((5, 4), lambda x, W: x @ W, x, W)
    assert not late.requires_grad
    assert not (late + 1).requires_grad


def test_in_inference_mode() -> None:
    x, W = inputs()
    with torch.inference_mode():
        late = LateTensor.of((5, 4), lambda x, W: x @ W, x * 1, W)
        assert torch.equal(late + 0, x @ W)


def test_autocast_is_that_of_its_making() -> None:
    x, W = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = x @ W
        late = LateTensor.of((5, 4), lambda x, W: x @ W, x, W)
    assert torch.equal(late + 0, expected.float())
    late.sum().backward()
    assert torch.equal(late.detach() + 0, expected.float())
