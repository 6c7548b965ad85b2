"""JumpReLU's thresholds stay fp32, whatever the rest is, and learn: in bf16 they would stand still.

A bf16 number near 0.7 has neighbours 0.004 away; an update of Adam is about the learning rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.nn import JumpReLUConfig, JumpReLUSAE
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing import assert_bitwise
from tests.settings import settings
from tests.step.harness import ROUTES, D, stepping, tokens

if TYPE_CHECKING:
    from sae_kernels.config import TrainConfig

F, LR, STEPS = 96, 1e-4, 30
PARAMETERS = {True: "log_threshold", False: "threshold"}
both = pytest.mark.parametrize("log", [True, False], ids=PARAMETERS.values())


def _sae(log: bool) -> JumpReLUSAE:
    sae = JumpReLUSAE(JumpReLUConfig(D, F, threshold_init=0.3, bandwidth=0.5, log_threshold=log))
    with torch.no_grad():  # numbers of more bits than bf16 has
        sae.get_parameter(PARAMETERS[log]).add_(0.123 * torch.rand(F))
    return sae


def _config(**changes: Any) -> TrainConfig:
    l0 = {"sparsity": "l0", "sparsity_coefficient": 0.2, "sparsity_warmup_steps": 0}
    return settings(JumpReLUConfig, **{"compute": "bfloat16", "loss": "mse", **l0, **changes})


def _assert_learnt(before: torch.Tensor, after: torch.Tensor, moves: list[torch.Tensor]) -> None:
    """Thresholds went far; added up in bf16 the same moves go nowhere."""
    assert after.dtype == torch.float32
    went = (after - before).abs()
    assert float(went.median()) > 0.5 * STEPS * LR
    lost = before.bfloat16()
    for move in moves:
        lost = lost + move.bfloat16()
    assert float((lost - before.bfloat16()).abs().median()) == 0
    torch.testing.assert_close(before + torch.stack(moves).sum(0), after, rtol=1e-5, atol=1e-6)


def _train(step: FusedStep | AutogradStep, name: str) -> list[torch.Tensor]:
    """How the thresholds moved in each step."""
    threshold, moves = step.sae.get_parameter(name), []
    for i in range(STEPS):
        before = threshold.detach().clone()
        assert not step(tokens(64, seed=i), lr=LR).skipped
        moves.append(threshold.detach() - before)
    return moves


@both
@pytest.mark.parametrize("route", ROUTES)
def test_in_bf16_compute_they_learn(route: str, log: bool) -> None:
    sae, name = _sae(log), PARAMETERS[log]
    before = sae.get_parameter(name).detach().clone()
    moves = _train(stepping(ROUTES[route], sae, _config()), name)
    _assert_learnt(before, sae.get_parameter(name).detach(), moves)


@both
def test_in_a_bf16_module_they_learn(log: bool) -> None:
    """Everything else of it is too coarse for this learning rate."""
    sae, name = _sae(log).to(torch.bfloat16), PARAMETERS[log]
    before, weights = sae.get_parameter(name).detach().clone(), sae.W_dec.detach().clone()
    moves = _train(stepping(AutogradStep, sae, _config()), name)
    _assert_learnt(before, sae.get_parameter(name).detach(), moves)
    large = weights.abs() > 0.1
    assert_bitwise("large weights", sae.W_dec.detach()[large], weights[large])


CASTS = {
    "to-bf16": lambda sae: sae.to(torch.bfloat16),
    "bfloat16": lambda sae: sae.bfloat16(),
    "half": lambda sae: sae.half(),
    "to-and-back": lambda sae: sae.to(torch.bfloat16).to(torch.float32),
    "device-and-dtype": lambda sae: sae.to("cpu", torch.float16),
    "inside-another": lambda sae: torch.nn.ModuleList([sae]).bfloat16()[0],
}


@both
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casting_a_module_keeps_them(cast: Any, log: bool) -> None:
    sae, name = _sae(log), PARAMETERS[log]
    exact, other = sae.get_parameter(name).detach().clone(), sae.W_enc.detach().clone()
    parameter = sae.get_parameter(name)
    cast(sae)
    assert_bitwise(name, sae.get_parameter(name).detach(), exact)
    assert sae.get_parameter(name) is parameter  # an optimizer may hold it already
    assert (sae.W_enc.float() != other).any()
    assert sae(tokens(3).to(sae.W_enc.dtype)).x_hat.isfinite().all()


@both
def test_casting_after_a_backward_pass_keeps_them(log: bool) -> None:
    """A parameter whose gradient is there is cast another way."""
    sae, name = _sae(log), PARAMETERS[log]
    exact = sae.get_parameter(name).detach().clone()
    sae(tokens(8)).x_hat.sum().backward()
    sae.to(torch.bfloat16)
    assert_bitwise(name, sae.get_parameter(name).detach(), exact)
    sae.zero_grad()
    sae(tokens(8)).x_hat.sum().backward()
    assert sae.get_parameter(name).grad.dtype == torch.float32


def test_both_parameters_are_the_same_function() -> None:
    raw, logs = _sae(False).eval(), _sae(True).eval()
    logs.load_state_dict(
        {n: t for n, t in raw.state_dict().items() if n != "threshold"}
        | {"log_threshold": raw.thresholds().detach().log()}
    )
    codes = [sae.encode(tokens(20)) for sae in (raw, logs)]
    assert_bitwise("latents", *(c.indices for c in codes))
    assert_bitwise("values", *(c.values for c in codes))


def test_training_mode_adds_the_lower_half_of_the_window() -> None:
    """As zeros; in evaluation only what fires is there."""
    sae, x = _sae(True), tokens(30)
    training = sae.train().encode(x)
    evaluating = sae.eval().encode(x)
    assert_bitwise("codes", training.to_dense().detach(), evaluating.to_dense().detach())
    assert (evaluating.values > 0).all()
    assert int((training.values == 0).sum()) > 50
    assert training.values.numel() == evaluating.values.numel() + int((training.values == 0).sum())
