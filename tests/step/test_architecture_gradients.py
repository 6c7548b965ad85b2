"""Every loss and gradient of every architecture is the dense oracle's, on both routes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.testing import assert_bitwise, assert_within
from tests.step.architectures import ARCHITECTURES, B, batch, build, route_of
from tests.step.clear_batches import clear_batch
from tests.step.dense_steps import Expected, assert_result, expected
from tests.step.harness import ROUTES, counted, state

if TYPE_CHECKING:
    from tests.step.architectures import Architecture

WAYS = ("sparse", "dense", "dense-tiles", "autograd")
CASES = [
    (name, way)
    for name, case in ARCHITECTURES.items()
    for way in WAYS
    if "dense" not in way or case.can_be_dense()
]


def _assert_something_is_tested(case: Architecture, want: Expected) -> None:
    for name, gradient in want.gradients.items():
        assert gradient.value.abs().max() > 20 * gradient.error.max(), name
    if case.settings().optimizer.clip_norm is not None:
        squares = sum(gradient.value.square().sum() for gradient in want.gradients.values())
        assert float(squares) ** 0.5 == pytest.approx(case.settings().optimizer.clip_norm, rel=1e-5)
    assert (float(want.aux_loss.value) > 0) == (case.settings().objective.auxk_alpha > 0)


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda part: part)
def test_losses_and_all_gradients_are_the_oracles(
    name: str, way: str, either_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With beta1 = 0 Adam's first moment is the gradient itself, projected and clipped."""
    case = ARCHITECTURES[name]
    case = dataclasses.replace(case, train={**case.train, "beta1": 0.0})
    step = route_of(case, way, either_backend, monkeypatch)
    x, target = clear_batch(step, *batch(case, 2 * B), B)
    want = expected(step, x, target)
    _assert_something_is_tested(case, want)
    result, fired = counted(step, x=x, lr=1e-3, target=target)
    assert_result(result, want)
    assert_bitwise("fired", fired.long(), want.fired)
    moments = state(step).moments
    assert moments.keys() == want.gradients.keys()
    for parameter, bound in want.gradients.items():
        assert_within(parameter, moments[parameter][0], bound.value, bound.error)


@pytest.mark.parametrize("name", ["jumprelu-log-l0", "jumprelu-raw-target", "jumprelu-raw-tanh"])
def test_thresholds_learn_from_both_sides_of_their_window(name: str) -> None:
    """The case above would mean little if no entry lay in a window, or on one side only."""
    case = ARCHITECTURES[name]
    step = build(case, ROUTES["fused"])
    x, _ = batch(case)
    with torch.no_grad():
        sae: Any = step.sae
        h = sae.centred(x) @ sae.W_enc.T + sae.b_enc
        away = (h - sae.thresholds()) / sae.config.bandwidth
    assert int(((away > 0) & (away < 0.5)).sum()) > 10
    assert int(((away < 0) & (away > -0.5)).sum()) > 10
