"""Batches at the edge: nothing fires, everything does, one token, no numbers. All train on."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.nn import BatchTopKConfig, GatedSAE, JumpReLUSAE, TopKConfig
from sae_kernels.nn import build as build_sae
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing import assert_bitwise
from tests.settings import settings
from tests.step.architectures import ARCHITECTURES, REPRESENTATIVE, B, batch, build
from tests.step.harness import ROUTES, everything, state, stepping

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sae_kernels.step import StepResult
    from tests.step.architectures import Architecture

LR = 1e-3
Step = FusedStep | AutogradStep


def _each(names: Iterable[str]) -> pytest.MarkDecorator:
    pairs = [(name, route) for name in names for route in ROUTES]
    return pytest.mark.parametrize(
        ("case", "route"),
        [(ARCHITECTURES[name], ROUTES[route]) for name, route in pairs],
        ids=["-".join(pair) for pair in pairs],
    )


each, representative = _each(ARCHITECTURES), _each(REPRESENTATIVE)


def _shifted(case: Architecture, route: type[Step], by: float) -> Step:
    """A route all of whose pre-activations, and sizes of gated codes, are moved this far."""
    step = build(case, route)
    with torch.no_grad():
        step.sae.b_enc.add_(by)
        if isinstance(step.sae, GatedSAE):
            step.sae.b_mag.add_(by)
    return step


def _trains_on(step: Step, case: Architecture, n: int = B, steps: int = 3) -> list[StepResult]:
    results = []
    for i in range(steps):
        x, target = batch(case, n, seed=i)
        results.append(step(x, lr=LR, target=target))
        assert not results[-1].skipped
        assert results[-1].loss.isfinite()
        assert results[-1].fvu.isfinite() or n == 1
    for name, tensor in step.sae.state_dict().items():
        assert tensor.isfinite().all(), name
    return results


@each
def test_nothing_fires(case: Architecture, route: type[Step]) -> None:
    step = _shifted(case, route, -1e3)
    before = state(_after_a_step(step, case))
    results = _trains_on(step, case)
    if step.sae.drops_zeros:
        assert [float(result.l0) for result in results] == [0.0] * 3
        # Only b_dec (and a skip connection) can learn from such a batch, and vectors of F latents
        # whose penalty wants them to.
        moments = state(step).moments
        for name in ("W_enc", "W_dec"):
            if not case.train.get("preact_coefficient") or name == "W_dec":
                assert not moments[name][0].any(), name
        assert (state(step).weights["b_dec"] != before.weights["b_dec"]).any()
        assert int((step.dead.since_fired >= 3 * B).sum()) == case.sae.n_latents


def _after_a_step(step: Step, case: Architecture) -> Step:
    """torch's Adam has no moments before."""
    x, target = batch(case, seed=9)
    step(x, lr=LR, target=target)
    return step


@each
def test_everything_fires(case: Architecture, route: type[Step]) -> None:
    step = _shifted(case, route, 30.0)
    for result in _trains_on(step, case):
        if hasattr(case.sae, "k"):
            k = case.sae.k * getattr(case.sae, "n_sources", 1)
            assert float(result.l0) == pytest.approx(int(k * B) / B, rel=2**-23)
        else:
            assert float(result.l0) == case.sae.n_latents


@representative
@pytest.mark.parametrize("n", [1, 2])
def test_fewer_tokens_than_k(case: Architecture, route: type[Step], n: int) -> None:
    """One token has no variance, so neither FVU nor AuxK has a scale for it; see below."""
    case = dataclasses.replace(case, train={**case.train, "loss": "mse", "auxk_alpha": 0.0})
    _trains_on(build(case, route), case, n)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("name", ["topk", "batchtopk", "relu-tanh", "jumprelu-log-target"])
def test_one_token_has_no_fvu_and_is_skipped(name: str, route: type[Step]) -> None:
    case = ARCHITECTURES[name]
    step = build(case, route)
    before = {n: t.clone() for n, t in step.sae.state_dict().items()}
    assert step(batch(case, 1)[0], lr=LR).skipped
    for n, t in step.sae.state_dict().items():
        assert_bitwise(n, t.reshape(-1), before[n].reshape(-1))
    _trains_on(step, case)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("auxk_alpha", [0.0, 0.5])
def test_a_share_of_k_too_small_for_one_entry(route: type[Step], auxk_alpha: float) -> None:
    """int(k B) = 0: the batch keeps nothing."""
    given = {"compute": "float32", "auxk_alpha": auxk_alpha, "dead_after_tokens": 2}
    config = BatchTopKConfig(5, 12, k=0.4)
    step = stepping(route, build_sae(config), settings(config, **given))
    unset = float(step.sae.get_buffer("threshold"))
    for i in range(4):
        result = step(torch.randn(2, 5), lr=LR)
        assert float(result.l0) == 0
        assert result.loss.isfinite()
        assert (float(result.aux_loss) > 0) == (auxk_alpha > 0 and i > 0)
    assert float(step.sae.get_buffer("threshold")) == unset  # nobody has seen a smallest key


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_as_many_latents_as_there_are(route: type[Step]) -> None:
    for config in (TopKConfig(5, 7, 7), BatchTopKConfig(5, 7, k=7), TopKConfig(5, 1, 1)):
        step = stepping(route, build_sae(config), settings(config, compute="float32"))
        for i in range(3):
            result = step(torch.randn(6, 5), lr=LR)
            assert result.loss.isfinite(), i


@representative
@pytest.mark.parametrize(
    ("poison", "compute"), [(float("nan"), "float32"), (float("inf"), "bfloat16")]
)
def test_a_batch_that_is_not_finite_changes_nothing(
    case: Architecture, route: type[Step], poison: float, compute: str
) -> None:
    """Weights, moments, counters, compute copies and thresholds stay as they are, bit for bit."""
    case = dataclasses.replace(case, train={**case.train, "compute": compute})
    step = _after_a_step(build(case, route), case)
    for i, place in enumerate([(3, 1), (0, 0)]):
        before = everything(step)
        x, target = batch(case, seed=i)
        bad = x if target is None or i == 0 else target
        bad[place] = poison
        result = step(x, lr=LR, target=target)
        assert result.skipped
        assert not result.loss.isfinite()
        after = everything(step)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert_bitwise(name, after[name], tensor)
        _trains_on(step, case, steps=1)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", [n for n in REPRESENTATIVE if ARCHITECTURES[n].can_be_dense()])
def test_a_skipped_batch_leaves_no_trace_in_what_follows(name: str, dense: bool) -> None:
    """In the steps after it the schedule is one further, and that is all."""
    case: Any = ARCHITECTURES[name]
    ran, spared = (_after_a_step(build(case, FusedStep), case) for _ in range(2))
    x, target = batch(case, seed=3)
    ran(torch.full_like(x, torch.nan), lr=LR, target=target)
    spared.schedule = copy.deepcopy(ran.schedule)
    for step in (ran, spared):
        step.dense_next = dense
        step(x, lr=LR, target=target)
    for name, tensor in everything(spared).items():
        assert_bitwise(name, everything(ran)[name], tensor)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_thresholds_that_nobody_reaches_are_left_alone(route: type[Step]) -> None:
    """Far above every pre-activation no window holds an entry: no gradient, and no NaN."""
    case = ARCHITECTURES["jumprelu-log-l0"]
    step = build(case, route)
    assert isinstance(step.sae, JumpReLUSAE)
    with torch.no_grad():
        step.sae.get_parameter("log_threshold").fill_(80.0)  # exp overflows to 5e34
    _trains_on(step, case)
    assert not state(step).moments["log_threshold"][0].any()
