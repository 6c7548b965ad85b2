"""What a Switch SAE's gates and its router learn from the reconstruction, in fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.testing import assert_within, gamma
from tests.nn.switch_spec import F64, B, D, Dense, E, F, K, dense_switch, each, sae_of, x_of

if TYPE_CHECKING:
    from torch import Tensor

    from sae_kernels.nn import SwitchSAE


def test_the_gate_s_gradient_is_the_error_along_what_the_expert_added() -> None:
    sae, x = sae_of().double(), x_of(B).double()
    preacts = sae.select(sae.centred(x))
    p = preacts.routing.probabilities
    p.retain_grad()
    x_hat = sae.decode(sae.activate(preacts))
    loss = (x_hat - x).square().sum()
    loss.backward()
    g = 2 * (x_hat - x).detach()
    rows = sae.W_dec.detach()[preacts.indices.long()]
    along = torch.einsum("bd,bkd->bk", g, rows) * preacts.values.detach().relu()
    expected = torch.zeros_like(p).scatter(
        1, preacts.routing.experts.long()[:, None], along.sum(1)[:, None]
    )
    terms = torch.einsum("bd,bkd->bk", g.abs(), rows.abs()) * preacts.values.detach().relu()
    budget = gamma(2 * (D + K + 4), F64) * terms.sum(1)[:, None]
    assert_within("dL/dp", p.grad, expected, budget)
    assert ((p.grad != 0).sum(1) <= 1).all()
    # dL/dlogit_i = p_i (dL/dp_i - sum_j p_j dL/dp_j), and the logits are linear.
    q = p.detach()
    slope = q * (expected - (q * expected).sum(1, keepdim=True))
    inputs = x - sae.b_router.detach()
    size = terms.sum(1)[:, None] * q * (q.gather(1, preacts.routing.experts.long()[:, None]) + 1)
    reach = x.abs() + 2 * sae.b_dec.detach().abs() + sae.b_router.detach().abs()
    budget = gamma(2 * (D + K + E + B + 8), F64) * (size.T @ reach)
    assert_within("dL/dW_router", sae.W_router.grad, slope.T @ inputs, budget)


def _sizes(sae: SwitchSAE, x: Tensor, dense: Dense) -> dict[str, Tensor]:
    """Absolute terms of every gradient of ``sum (x_hat - x)^2``, factor by factor."""
    p = {n: t.detach().abs() for n, t in sae.named_parameters()}
    size = dense.size * dense.kept
    error = 2 * (size @ p["W_dec"] + p["b_dec"] + x.abs())
    b_dec = p["b_dec"] if sae.config.subtract_b_dec else 0
    inputs = x.abs() + b_dec
    along = (error @ p["W_dec"].T) * dense.kept
    by_code = along * dense.gate_size
    # Of the chosen one's logit p dp - p (p dp), of the others' the second term.
    chosen = torch.nn.functional.one_hot(dense.experts, dense.probabilities.shape[1])
    by_logit = chosen + dense.probabilities.detach()
    by_logit = by_logit * dense.relative * (along * size).sum(1, keepdim=True)
    by_x = by_code @ p["W_enc"] + by_logit @ p["W_router"]
    return {
        "W_enc": by_code.T @ inputs,
        "b_enc": by_code.sum(0),
        "W_dec": size.T @ error,
        "b_dec": (error + by_x * 2).sum(0),
        "W_router": by_logit.T @ (x.abs() + 2 * p["b_dec"] + p["b_router"]),
        "b_router": (by_logit @ p["W_router"]).sum(0),
        "x": error + by_x,
    }


@each
def test_gradients_are_the_dense_formula_s(options: dict[str, Any]) -> None:
    sae, x = sae_of(**options).double(), x_of(B).double().requires_grad_()
    (sae(x).x_hat - x).square().sum().backward()
    p = {n: t.detach().clone().requires_grad_() for n, t in sae.named_parameters()}
    same = x.detach().clone().requires_grad_()
    dense = dense_switch(sae.config, p, same)
    (dense.x_hat - same).square().sum().backward()
    sizes = _sizes(sae, x.detach(), dense)
    # Each factor of a product of four sums brings its own roundings.
    n = 4 * (D + F + B + E + 8)
    for name, t in [*sae.named_parameters(), ("x", x)]:
        want = same.grad if name == "x" else p[name].grad
        grad = torch.zeros_like(t) if t.grad is None else t.grad
        want = torch.zeros_like(t) if want is None else want
        assert_within(name, grad, want, gamma(n, F64) * sizes[name])
        silent = sae.config.gate == "heaviside" and "router" in name
        assert bool(grad.any()) != silent, name
