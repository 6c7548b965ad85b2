"""The fused and the composable route are the same training, and both are the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sae_kernels.primitives.checks import gradient_operand
from sae_kernels.testing import (
    adam_budgets,
    assert_bitwise,
    assert_same_selection,
    assert_within,
    norm_budget,
    oracles,
)
from sae_kernels.training import evaluate
from tests.step.bounded import Bounded, Expected, Kept, expected_step
from tests.step.harness import (
    ROUTES,
    VARIANTS,
    B,
    Seen,
    State,
    Variant,
    build,
    load,
    state,
    tokens,
    watched,
)

if TYPE_CHECKING:
    from sae_kernels.config import TrainConfig

STEPS, LR = 200, 2e-3


def _kept(seen: tuple[Tensor, Tensor], relu: bool = True) -> Kept:
    values, indices = seen
    return Kept(indices, values > 0 if relu else torch.ones_like(values, dtype=torch.bool))


def _check_selection(name: str, kept: Kept, h: Bounded, key: Bounded, k: int | None = None) -> None:
    """The first k are the k largest keys and ReLU dropped no positive one, up to rounding."""
    k = k or kept.indices.shape[1]
    assert_same_selection(name, kept.indices[:, :k], key.value, k, key.error)
    value, slack = (t.gather(1, kept.indices.long()) for t in (h.value, h.error))
    alive = kept.fired | (value <= slack)
    assert alive.all(), f"{name}: dropped {value[~alive].tolist()}"


def _check_step(
    name: str, before: State, after: State, seen: Seen, expected: Expected, train: TrainConfig
) -> None:
    """Losses, moments (the implied gradients) and parameters are the formulas', within bounds."""
    for field in ("loss", "fvu", "aux_loss"):
        bound: Bounded = getattr(expected, field)
        assert_within(f"{name} {field}", getattr(seen.result, field), bound.value, bound.error)
    t = int(before.n_updates) + 1
    # Not skipped; the clip is in the expected gradients already.
    corrections = [1 - beta**t for beta in (train.optimizer.beta1, train.optimizer.beta2)]
    hyper = torch.tensor([LR, 1, *corrections, 0, t], dtype=torch.float64)
    for parameter, bound in expected.gradients.items():
        old = (before.weights[parameter], *before.moments[parameter])
        want = oracles.row_update(oracles.AdamState(*old), bound.value, hyper)
        budget, dm, dv = adam_budgets(old, bound.value, bound.error, hyper, torch.float32)
        new = want.param
        if parameter == "W_dec" and expected.unit_norm:
            budget = norm_budget(new, budget, torch.float32, 1)
            new = torch.nn.functional.normalize(new)
        m, v = after.moments[parameter]
        assert_within(f"{name} m of {parameter}", m, want.m, dm)
        assert_within(f"{name} v of {parameter}", v, want.v, dv)
        assert_within(f"{name} {parameter}", after.weights[parameter], new, budget)


def _same(a: Kept | None, b: Kept | None) -> bool:
    return a is b or all(map(torch.equal, a, b))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_each_step_from_the_same_state_is_the_same(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of up to 200 steps both routes are within the bounds of one oracle, so of each other.

    Where they keep different latents (which must lie inside the rounding band) each is held to
    the oracle of its own selection. Such flips are counted.
    """
    routes = {name: build(variant, route) for name, route in ROUTES.items()}
    sae, train = variant.settings()
    flips = aux_steps = 0
    for i in range(variant.steps):
        before = state(routes["fused"])
        load(routes["autograd"], before)
        x, k = tokens(B, seed=i), train.k_at(i, sae.k)
        dead = routes["fused"].dead.longest(train.objective.auxk_latents)
        seen = {n: watched(monkeypatch, r, x, lr=LR, k=k) for n, r in routes.items()}
        main = {n: _kept(s.main, sae.relu != "none") for n, s in seen.items()}
        aux = {n: None if s.aux is None else _kept(s.aux) for n, s in seen.items()}
        aux_steps += aux["fused"] is not None
        flipped = not all(_same(kept["fused"], kept["autograd"]) for kept in (main, aux))
        flips += flipped
        for name, route in routes.items():
            # Autograd multiplies operands of one dtype, the fused step keeps its residual in fp32.
            compute = getattr(torch, train.optimizer.compute)
            upstream = torch.float32 if name == "fused" else gradient_operand(compute)
            if name == "fused" or flipped or upstream != torch.float32:
                expected = expected_step(
                    before.weights, x, sae, train, k, main[name], dead, aux[name], upstream
                )
            label = f"step {i} {name}"
            _check_step(label, before, state(route), seen[name], expected, train)
            if flipped or i % 20 == 0:
                _check_selection(label, main[name], expected.h, expected.key, k)
                _check_selection(label, main[name], expected.h, expected.key)
                if dead.numel():
                    _check_selection(f"{label} AuxK", aux[name], expected.aux_h, expected.aux_h)
    # Two keys of a token within 1e-6 at the cut: less than one in 10^5 tokens; the same order of
    # work in both routes (same backend) makes even these go the same way.
    assert flips <= (2 if variant.other_backend else 0)
    assert aux_steps == 0 if variant.n_dead == 0 else aux_steps > variant.steps // 2


@pytest.mark.full
@pytest.mark.parametrize("variant", ["default", "many-dead", "bf16"])
def test_run_freely_both_reach_the_same_fvu(variant: str) -> None:
    """Rounding differences grow with the steps, but training must not care: within 1 %."""
    sae, train = VARIANTS[variant].settings()
    fvu = []
    for kind in ROUTES.values():
        route = build(VARIANTS[variant], kind)
        for i in range(STEPS):
            route(tokens(B, seed=i), lr=LR, k=train.k_at(i, sae.k))
        fvu.append(evaluate(route.sae, tokens(2000, seed=999)).fvu)
    assert fvu[0] < 0.6, "nothing was learnt, so nothing was compared"
    assert fvu[0] == pytest.approx(fvu[1], rel=0.01)


def test_routes_report_the_same_l0_and_dead() -> None:
    routes = [build(VARIANTS["few-dead"], route) for route in ROUTES.values()]
    for i in range(20):
        fused, composable = (route(tokens(B, seed=i), lr=LR) for route in routes)
        assert float(fused.l0) == float(composable.l0)
        assert_bitwise("since fired", *(route.dead.since_fired for route in routes))
        assert int(routes[0].n_updates) == int(routes[1].n_updates) == i + 1
