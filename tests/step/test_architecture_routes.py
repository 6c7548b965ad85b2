"""Both routes train every architecture alike: step by step against one oracle, and run freely."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.nn import BatchTopKSAE
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing import adam_budgets, assert_bitwise, assert_within, norm_budget, oracles
from tests.step.architectures import (
    ARCHITECTURES,
    DEAD,
    DEAD_AFTER,
    REPRESENTATIVE,
    B,
    batch,
    build,
)
from tests.step.clear_batches import clear_batch
from tests.step.dense_steps import assert_result, expected
from tests.step.harness import ROUTES, counted, load, state, tokens

if TYPE_CHECKING:
    from torch import Tensor

    from tests.step.architectures import Architecture
    from tests.step.dense_steps import Expected
    from tests.step.harness import State

LR = 2e-3


def _assert_step(case: Architecture, before: State, after: State, want: Expected) -> None:
    """Moments and parameters are those of Adam on the oracle's gradients."""
    train, t = case.settings(), int(before.n_updates) + 1
    corrections = [1 - beta**t for beta in (train.optimizer.beta1, train.optimizer.beta2)]
    # The clip is in the expected gradients already.
    hyper = torch.tensor([LR, 1, *corrections, 0, t], dtype=torch.float64)
    for name, bound in want.gradients.items():
        old = (before.weights[name], *before.moments[name])
        state = oracles.AdamState(*old)
        new = oracles.row_update(state, bound.value, hyper)
        budget, dm, dv = adam_budgets(old, bound.value, bound.error, hyper, torch.float32)
        param = new.param
        if name == "W_dec" and case.sae.unit_norm_decoder:
            budget = norm_budget(param, budget, torch.float32, case.sae.row_parts)
            rows = param.unflatten(1, (case.sae.row_parts, -1))
            param = torch.nn.functional.normalize(rows, dim=2).flatten(1)
        m, v = after.moments[name]
        assert_within(f"m of {name}", m, new.m, dm)
        assert_within(f"v of {name}", v, new.v, dv)
        assert_within(name, after.weights[name], param, budget)


def _follow(case: Architecture, steps: int, size: int = B) -> list[bool]:
    """Both routes from the same state at each step; which pass FusedStep took.

    With a ``size`` the batch comes in micro-batches, and the oracle's is the step of all of it.
    """
    fused, composable = build(case, FusedStep), build(case, AutogradStep)
    dense = []
    for i in range(steps):
        # Two latents stay dead: AuxK and the penalty on pre-activations have something to do.
        fused.dead.since_fired[DEAD] = DEAD_AFTER
        before = state(fused)
        load(composable, before)
        x, target = clear_batch(fused, *batch(case, B + 20, seed=i), B)
        want = expected(fused, x, target)
        dense.append(fused.dense_next)
        for route in (fused, composable):
            given = x if size == B else x.split(size)
            targets = target if target is None or size == B else target.split(size)
            result, fired = counted(route, x=given, lr=LR, target=targets)
            assert_result(result, want)
            assert_bitwise("fired", fired.long(), want.fired)
            _assert_step(case, before, state(route), want)
        _assert_same_rest(fused, composable)
    return dense


def _assert_same_rest(fused: FusedStep, composable: AutogradStep) -> None:
    """Counters, schedules and the inference threshold."""
    assert_bitwise("since fired", fused.dead.since_fired, composable.dead.since_fired)
    assert (fused.schedule.step, fused.schedule.p) == (
        composable.schedule.step,
        composable.schedule.p,
    )
    # Ratios of sums over ten steps of B F entries, each off by a few roundings of its own.
    assert fused.schedule.factor == pytest.approx(composable.schedule.factor, rel=1e-5)
    composable.schedule.factor = fused.schedule.factor
    if isinstance(fused.sae, BatchTopKSAE):
        thresholds = [float(route.sae.get_buffer("threshold")) for route in (fused, composable)]
        assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-5)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_each_step_is_the_oracles(name: str) -> None:
    _follow(ARCHITECTURES[name], 15)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize("size", [5, 8])
def test_each_step_in_micro_batches_is_the_oracles_of_the_whole_batch(name: str, size: int) -> None:
    """Rounding has the same bound in any order of the sums; what is kept does not differ at all."""
    assert B % size, "the last one is smaller"
    _follow(ARCHITECTURES[name], 20, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_of_two_hundred_steps_is_the_oracles(name: str) -> None:
    _follow(ARCHITECTURES[name], 200)


def _data(case: Architecture, i: int) -> tuple[Tensor, Tensor | None]:
    config = case.sae
    x = tokens(64, seed=i, d_in=config.input_width, n_features=30)
    mixed = torch.randn(config.input_width, config.output_width, generator=_fixed())
    return x, x @ mixed / config.input_width**0.5 if config.transcodes else None


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(77)


def _trained(case: Architecture, route: type[FusedStep | AutogradStep], steps: int) -> Tensor:
    """The FVU of each batch just before it was learnt from.

    The slope of f^p grows without bound near 0 and rounding differences with it: at p = 0.2 two
    runs part within fifty steps, so p ends at 0.8 here.
    """
    step = build(dataclasses.replace(case, train={**case.train, "p_end": 0.8}), route)
    fvu = []
    for i in range(steps):
        x, target = _data(case, i)
        fvu.append(step(x, lr=5e-3, target=target).fvu)
    return torch.stack(fvu)


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in REPRESENTATIVE[1::5] else pytest.mark.slow)
        for n in ARCHITECTURES
    ],
)
def test_run_freely_both_reach_the_same_fvu(name: str) -> None:
    """Rounding differences grow with the steps, but training must not care: within 1 %."""
    runs = [_trained(ARCHITECTURES[name], route, 200) for route in ROUTES.values()]
    first, *last = runs[0][:10].mean(), *(fvu[-20:].mean() for fvu in runs)
    assert last[0] < 0.7 * first, "nothing was learnt, so nothing was compared"
    assert float(last[0]) == pytest.approx(float(last[1]), rel=0.01)
