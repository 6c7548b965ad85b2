"""Which of its two passes FusedStep takes, and that nobody can tell from the result."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.nn import ReLUConfig, ReLUSAE
from sae_kernels.step import FusedStep
from sae_kernels.step import fused_step as step_module
from sae_kernels.step.fused_step import DENSE_FROM
from sae_kernels.testing import assert_bitwise, assert_within
from tests.settings import settings
from tests.step.architectures import ARCHITECTURES, B, F, batch, build
from tests.step.clear_batches import clear_batch
from tests.step.dense_steps import assert_result, expected
from tests.step.harness import state, stepping

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NEVER = ["topk", "multi-topk", "batchtopk", "matryoshka-mean", "skip-transcoder"]
SUMS_OVER_ENTRIES = ["jumprelu-raw-l0", "relu-l1", "relu-tanh", "gated-free", "crosscoder-l1-sum"]
# A square of a sum over the batch, and a sum over entries that are not kept.
WHOLE = ["jumprelu-raw-target", "jumprelu-log-target", "jumprelu-raw-preact", "jumprelu-raw-tanh"]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that ran, by name."""
    names: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            names.append(name)
            return real(*arguments)

        return run

    for name in ("dense", "sparse"):
        function = f"{name}_pass"
        monkeypatch.setattr(step_module, function, noted(name, getattr(step_module, function)))
    return names


@pytest.mark.parametrize("name", NEVER + WHOLE)
def test_some_objectives_are_never_dense(name: str, taken: list[str]) -> None:
    case = ARCHITECTURES[name]
    step = build(case, FusedStep)
    with torch.no_grad():
        step.sae.b_enc.add_(10.0)
    for i in range(3):
        x, target = batch(case, seed=i)
        step(x, lr=1e-3, target=target)
    assert taken == ["sparse"] * 3


@pytest.mark.parametrize("name", SUMS_OVER_ENTRIES)
def test_the_first_step_is_dense_and_the_last_one_decides_the_next(
    name: str, taken: list[str]
) -> None:
    case = ARCHITECTURES[name]
    step = build(case, FusedStep)
    x, _ = batch(case)
    for shift in (-20.0, 0.0, 40.0, -40.0):  # few fire, few fire, all do, few do
        with torch.no_grad():
            step.sae.b_enc.add_(shift)
        step(x, lr=0.0)
    # Each follows what the one before it saw.
    assert taken == ["dense", "sparse", "sparse", "dense"]
    step(x, lr=0.0)
    assert taken[-1] == "sparse"


def _with_entries(n: int) -> tuple[FusedStep, Tensor]:
    """A ReLU SAE of 64 latents and a batch of which n entries are positive."""
    sae = ReLUSAE(ReLUConfig(64, 64, subtract_b_dec=False))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(64))
    x = -torch.ones(8 * 64)
    x[torch.randperm(8 * 64)[:n]] = 1.0
    config = settings(sae.config, compute="float32", loss="mse")
    return stepping(FusedStep, sae, config), x.view(8, 64)


@pytest.mark.parametrize("first", ["dense", "sparse"])
def test_dense_begins_above_a_twentieth_of_the_entries(first: str, taken: list[str]) -> None:
    limit = int(DENSE_FROM * 8 * 64)
    assert limit == 8 * 64 // 20
    for n, expected_next in ((limit - 1, "sparse"), (limit, "sparse"), (limit + 1, "dense")):
        step, x = _with_entries(n)
        step.dense_next = first == "dense"
        step(x, lr=0.0)
        step(x, lr=0.0)
        assert taken[-2:] == [first, expected_next], n


@pytest.mark.parametrize("shift", [-0.8, 0.0, 1.5], ids=["few-fire", "half-fires", "most-fire"])
@pytest.mark.parametrize("name", SUMS_OVER_ENTRIES)
def test_the_choice_does_not_show(name: str, shift: float) -> None:
    """Twenty steps of either pass, each within the budget of the same oracle."""
    case = ARCHITECTURES[name]
    case = dataclasses.replace(case, train={**case.train, "beta1": 0.0})
    routes = [build(case, FusedStep) for _ in range(2)]
    with torch.no_grad():
        for step in routes:
            step.sae.b_enc.add_(shift)
    for i in range(6):
        x, _ = clear_batch(routes[0], *batch(case, 2 * B, seed=i), B)
        want = expected(routes[0], x, None)
        for step, dense in zip(routes, (False, True), strict=True):
            step.dense_next = dense
            assert_result(step(x, lr=1e-3), want)
            for parameter, bound in want.gradients.items():
                m, _ = state(step).moments[parameter]
                assert_within(parameter, m, bound.value, bound.error)
        for mine, other in zip(routes[1].sae.parameters(), routes[0].sae.parameters(), strict=True):
            mine.data.copy_(other.data)  # one state for both


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SUMS_OVER_ENTRIES)
def test_in_half_precision_both_train_alike(name: str, compute: str) -> None:
    """A dense product rounds what comes out to the operands' dtype, as under autocast: a share of
    2^-9 (or 2^-12) of each term, so of the loss as well."""
    case = ARCHITECTURES[name]
    case = dataclasses.replace(case, train={**case.train, "compute": compute, "auxk_alpha": 0})
    found = []
    for dense in (False, True):
        step = build(case, FusedStep)
        losses = []
        for i in range(40):
            step.dense_next = dense
            losses.append(step(batch(case, 64, seed=i)[0], lr=5e-3).loss)
        found.append(torch.stack(losses))
    assert (found[0][-5:] < 0.8 * found[0][:5]).all(), "nothing was learnt"
    torch.testing.assert_close(found[1][:1], found[0][:1], rtol=2**-7, atol=0)
    torch.testing.assert_close(found[1].mean(), found[0].mean(), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["relu-l1", "crosscoder-l1-sum", "jumprelu-raw-l0", "gated-free"])
def test_lazy_adam_is_never_dense_and_leaves_alone_what_did_not_fire(
    name: str, taken: list[str]
) -> None:
    """A dense gradient has a row for every latent, and would let all their moments decay."""
    case = ARCHITECTURES[name]
    settings = {**case.train, "adam": "lazy", "auxk_alpha": 0}
    step = build(dataclasses.replace(case, train=settings), FusedStep)
    for i in range(2):  # rows get moments
        step(batch(case, seed=i)[0], lr=1e-3)
    quiet = slice(0, F, 2)
    with torch.no_grad():
        step.sae.b_enc[quiet] = -50.0
    before = state(step)
    step(batch(case, seed=9)[0], lr=1e-3)
    after = state(step)
    assert taken == ["sparse"] * 3
    assert (step.dead.since_fired[quiet] > 0).all()
    for n in ("W_enc", "W_dec"):
        assert before.moments[n][0][quiet].any()
        assert_bitwise(n, after.weights[n][quiet], before.weights[n][quiet])
        for old, new in zip(before.moments[n], after.moments[n], strict=True):
            assert_bitwise(n, new[quiet], old[quiet])
        assert (after.weights[n][1::2] != before.weights[n][1::2]).any()
