"""auxk where the decoder is wider or narrower than the encoder, as in a transcoder."""

from __future__ import annotations

import pytest
import torch
from refusals import needs

from sae_kernels.primitives.auxk import auxk
from sae_kernels.testing import assert_within, gamma, oracles

PRIMITIVES = ("auxk",)
ALPHA = 1 / 32
NAMES = ("loss", "dW_enc", "db_enc", "dW_dec")


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).double()


def expected(
    x: torch.Tensor, residual: torch.Tensor, weights: list[torch.Tensor], k: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The loss, gradients by autograd in fp64, and their budgets where all operands are integers.

    Then codes and errors are exact; roundings begin with the weight of the loss.
    """
    W_enc, b_enc, W_dec = leaves = [t.clone().requires_grad_() for t in weights]
    n_dead = W_enc.shape[0]
    h = x @ W_enc.T + b_enc
    kept = torch.zeros_like(h).scatter(1, oracles.selection(h.detach(), k), 1.0)
    codes = (h * kept).relu()
    error = codes @ W_dec + residual
    weight = ALPHA * min(n_dead / k, 1) / (residual - residual.mean(0)).square().sum()
    loss = weight * error.square().sum()
    exact = [loss.detach(), *torch.autograd.grad(loss, leaves)]

    B, D_out = residual.shape
    grad, on = (2 * weight * error).abs().detach(), (codes > 0).double()
    dh = grad @ W_dec.detach().abs().T * on
    budgets = [
        gamma(8, dtype) * exact[0],
        gamma(D_out + B + 8, dtype) * (dh.T @ x.abs()),
        gamma(D_out + B + 8, dtype) * dh.sum(0),
        gamma(B + 8, dtype) * (codes.detach().T @ grad),
    ]
    return exact, budgets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("widths", [(5, 11), (16, 3), (7, 7), (1, 40)], ids=str)
@pytest.mark.parametrize("k", [2, 9, 30], ids=lambda k: f"k-{k}")
def test_against_autograd(
    k: int, widths: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    (D, D_out), F, n_dead = widths, 25, 9
    x, weights = integers(40, D), [integers(F, D), integers(F), integers(F, D_out)]
    half = integers(20, D_out)
    residual = torch.cat([half, -half])  # the mean is 0: its variance is exact too
    latents = torch.arange(n_dead) * 2 + 1
    padded = torch.cat([latents, latents.new_full((4,), -1)]).int()
    count = torch.tensor(n_dead, dtype=torch.int32)
    operands = [t.to(dtype) for t in (x, residual, *weights)]
    arguments = (*operands, padded, count, k, ALPHA)
    needs("auxk", dtype, backend, arguments)
    came = auxk(*arguments, backend=backend)
    assert [list(t.shape) for t in came] == [[], [13, D], [13], [13, D_out]]
    exact, budgets = expected(x, residual, [w[latents] for w in weights], k, dtype)
    for name, a, e, budget in zip(NAMES, came, exact, budgets, strict=True):
        part = a[:n_dead] if a.dim() else a
        assert bool(e.any())
        assert_within(name, part, e, budget)


@pytest.mark.parametrize(("n_tokens", "n_dead"), [(0, 4), (12, 0)], ids=["no-token", "no-dead"])
def test_nothing_to_learn_is_no_loss(n_tokens: int, n_dead: int, backend: str) -> None:
    count = torch.tensor(n_dead, dtype=torch.int32)
    latents = torch.arange(4, dtype=torch.int32)
    operands = (integers(n_tokens, 5), integers(n_tokens, 8), integers(9, 5), integers(9))
    operands = [t.float() for t in (*operands, integers(9, 8))]
    arguments = (*operands, latents, count, 2, ALPHA)
    needs("auxk", torch.float32, backend, arguments)
    loss, dW_enc, db_enc, dW_dec = auxk(*arguments, backend=backend)
    assert float(loss) == 0
    assert [list(t.shape) for t in (dW_enc, db_enc, dW_dec)] == [[4, 5], [4], [4, 8]]
    for grad in (dW_enc, db_enc, dW_dec):
        assert not bool(grad[:n_dead].any())
