"""A Switch SAE written out densely: every expert multiplied, all but the chosen ones masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import SwitchConfig, SwitchSAE

if TYPE_CHECKING:
    from collections.abc import Mapping

D, F, K, E, B = 12, 40, 3, 5, 64
F64 = torch.float64
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "heaviside": {"gate": "heaviside"},
    "shared": {"shared_expert": True},
    "shared-heaviside": {"gate": "heaviside", "shared_expert": True},
    "raw-input": {"subtract_b_dec": False},
}
each = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def sae_of(n_experts: int = E, **options: Any) -> SwitchSAE:
    """Weights as after some training: nothing tied, nothing zero."""
    sae = SwitchSAE(SwitchConfig(D, F, k=K, n_experts=n_experts, **options))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=g))
    return sae


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(4))


def exact(sae: SwitchSAE, x: Tensor) -> Dense:
    """The dense formula of a module."""
    p = {name: t.detach().double() for name, t in sae.named_parameters()}
    return dense_switch(sae.config, p, x.double())


class Dense(NamedTuple):
    """What :func:`dense_switch` computes, in the dtype of its operands.

    Attributes:
        codes: [B, F].
        x_hat: [B, output width].
        experts: [B], of those that the router chooses among.
        probabilities: [B, number of these].
        kept: bool [B, F], the k largest, of which codes may be 0.
        size: [B, F], absolute terms of the codes: what is off by one rounding of all sums.
        gate_size: [B, F], the same of the gates.
        relative: [B, 1], the same of any probability over the probability.
    """

    codes: Tensor
    x_hat: Tensor
    experts: Tensor
    probabilities: Tensor
    kept: Tensor
    size: Tensor
    gate_size: Tensor
    relative: Tensor


def dense_switch(
    config: SwitchConfig, p: Mapping[str, Tensor], x: Tensor, experts: Tensor | None = None
) -> Dense:
    """The formulas of arXiv 2410.08201 with an encoder bias and, or not, a shared expert.

    Args:
        config, p: the SAE; parameters may want gradients.
        x: [B, input width], in the scale of training.
        experts: [B], in the place of the router's choice.
    """
    b_dec = p["b_dec"] if config.subtract_b_dec else 0 * x[0]
    h = (x - b_dec) @ p["W_enc"].T + p["b_enc"]
    probabilities = ((x - p["b_router"]) @ p["W_router"].T).softmax(1)
    experts = probabilities.argmax(1) if experts is None else experts
    owner = torch.arange(config.n_latents) // config.expert_width - int(config.shared_expert)
    gated = (owner >= 0) & (config.gate == "softmax")
    gate = torch.where(gated, probabilities.gather(1, experts[:, None]), 1.0)
    reachable = (owner == experts[:, None]) | (owner < 0)
    key = torch.where(reachable, h * gate, -torch.inf).detach()
    order = key.sort(dim=1, descending=True, stable=True).indices[:, : config.k]
    kept = torch.zeros_like(reachable).scatter(1, order, True)
    codes = torch.where(kept, h.relu() * gate, 0.0)
    x_hat = codes @ p["W_dec"] + p["b_dec"]
    relative = _relative(p, b_dec, x)
    terms = (x.abs() + abs(b_dec)) @ p["W_enc"].abs().T + p["b_enc"].abs()
    gate_size = gate * torch.where(gated, relative, 1.0)
    sizes = (gate_size * terms).detach(), gate_size.detach(), relative
    return Dense(codes, x_hat, experts, probabilities, kept, *sizes)


@torch.no_grad()
def _relative(p: Mapping[str, Tensor], b_dec: Tensor, x: Tensor) -> Tensor:
    """[B, 1], from ``dp / p <= exp(2 max |dlogit|) - 1``.

    The last 3 are the probability itself, the softmax's own roundings, and what the exponential has
    beyond first order.
    """
    shifted = x.abs() + 2 * abs(b_dec) + p["b_router"].abs()
    return 2 * (shifted @ p["W_router"].abs().T).max(1, keepdim=True).values + 3
