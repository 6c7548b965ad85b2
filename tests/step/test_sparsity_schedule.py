"""How strong a penalty is at each step: warm-up, p and the factor that goes with it, by hand."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import JumpReLUConfig, ReLUConfig, ReLUSAE
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.step.state import SparsitySchedule
from sae_kernels.testing.dense import decoder_norm
from tests.settings import settings
from tests.step.architectures import ARCHITECTURES, B, batch, route_of
from tests.step.harness import ROUTES, stepping

if TYPE_CHECKING:
    from sae_kernels.config import TrainConfig

L0 = torch.tensor(5.0)


def _schedule(**given: Any) -> SparsitySchedule:
    return _scheduled(settings(JumpReLUConfig, **given))


def _scheduled(config: TrainConfig) -> SparsitySchedule:
    assert config.objective is not None
    return SparsitySchedule(config.objective, config.steps)


def _coefficients(n: int, **given: Any) -> list[float]:
    schedule = _schedule(sparsity="l1", sparsity_coefficient=3.0, **given)
    found = []
    for _ in range(n):
        found.append(schedule.coefficient())
        schedule.advance(L0)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sparsity_warmup_steps": 0}, [3, 3, 3, 3, 3, 3]),
        ({"sparsity_warmup_steps": 1}, [3, 3, 3, 3, 3, 3]),
        ({"sparsity_warmup_steps": 4}, [0.75, 1.5, 2.25, 3, 3, 3]),
        ({"steps": 15}, [1, 2, 3, 3, 3, 3]),  # by default a fifth of the run
        ({"steps": 4}, [3, 3, 3, 3, 3, 3]),
    ],
)
def test_the_coefficient_rises_linearly(settings: dict[str, Any], expected: list[float]) -> None:
    assert _coefficients(6, **settings) == pytest.approx(expected, rel=1e-14)


def test_the_default_warmup_is_two_thousand_steps_at_most() -> None:
    found = _coefficients(2001, steps=1_000_000)
    assert found[0] == pytest.approx(3 / 2000)
    assert found[1998] < 3 == found[1999] == found[2000]


def _lp(**given: Any) -> TrainConfig:
    plain = {"sparsity": "lp", "sparsity_coefficient": 2.0, "sparsity_warmup_steps": 0}
    return settings(
        ReLUConfig, **{**plain, "loss": "mse", "auxk_alpha": 0.0, "compute": "float32"} | given
    )


def _powers(config: TrainConfig, n: int) -> list[float]:
    """p at each step."""
    schedule, found = _scheduled(config), []
    for _ in range(n):
        found.append(schedule.p)
        schedule.advance(L0)
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Five values from 1 to 0.2, at steps 4, 8, 12, 16 and 20.
        (
            {"steps": 20, "p_start": 0.2, "p_steps": 5},
            [1.0] * 8 + [0.8] * 4 + [0.6] * 4 + [0.4] * 4 + [0.2] * 2,
        ),
        ({"steps": 6, "p_start": 0.0, "p_steps": 3, "p_end": 0.0}, [1, 1, 1, 0.5, 0.5, 0.5, 0]),
        ({"steps": 4, "p_steps": 1, "p_end": 0.5}, [1, 1, 1, 1, 0.5]),
        # More values than steps, the last of each: at 0, 0.5, 1, ... rounded to even ones.
        ({"steps": 3, "p_start": 0.0, "p_steps": 7, "p_end": 0.4}, [0.9, 0.8, 0.5, 0.4]),
        ({"sparsity": "l1", "steps": 4, "p_start": 0.0}, [1, 1, 1, 1, 1]),
    ],
)
def test_p_falls_in_equal_steps(settings: dict[str, Any], expected: list[float]) -> None:
    found = _powers(_lp(**settings), len(expected))
    assert found == pytest.approx(expected)


def _sums(codes: list[Tensor], p: float) -> float:
    return sum(float(f[f > 0].double().pow(p).sum()) for f in codes)


def test_the_factor_keeps_the_penalty_at_its_mean_over_ten_steps() -> None:
    """Only the last ten steps before a change count, and factors of several changes multiply."""
    config = _lp(steps=60, p_start=0.0, p_steps=4, p_end=0.1)  # at 20, 40 and 60
    schedule = _scheduled(config)
    codes = [torch.rand(7, 5) * (i + 1) * (torch.rand(7, 5) > 0.4) for i in range(61)]
    factor = 1.0
    for i in range(61):
        if i in (20, 40, 60):
            now, then = 1.3 - 0.3 * i / 20, 1 - 0.3 * i / 20
            factor *= _sums(codes[i - 10 : i], now) / _sums(codes[i - 10 : i], then)
        assert schedule.factor == pytest.approx(factor, rel=1e-5), i
        assert schedule.coefficient() == pytest.approx(2 * factor, rel=1e-5)
        for part in codes[i].split(3):  # in several calls, as tiles come
            schedule.observe(part)
        schedule.advance(L0)


def test_steps_that_are_skipped_do_not_count() -> None:
    config = _lp(steps=8, p_start=0.0, p_steps=3, p_end=0.0)  # 0.5 at 4
    schedule, codes = _scheduled(config), torch.rand(4, 6, 5)
    for i in range(4):
        schedule.observe(torch.full((2,), torch.nan) if i == 2 else codes[i])
        schedule.advance(L0)
    seen = [codes[0], codes[1], codes[3]]
    assert schedule.p == 0.5
    assert schedule.factor == pytest.approx(_sums(seen, 1) / _sums(seen, 0.5), rel=1e-5)


@pytest.mark.parametrize("codes", [torch.zeros(3), torch.zeros(0)])
def test_without_any_code_the_factor_stays(codes: Tensor) -> None:
    schedule = _scheduled(_lp(steps=4, p_start=0.0, p_steps=2))
    for _ in range(5):
        schedule.observe(codes)
        schedule.advance(L0)
    assert (schedule.p, schedule.factor) == (pytest.approx(0.2), 1.0)


def test_the_coefficient_follows_a_target_once_it_has_risen() -> None:
    """By a factor of 1 + 10 / steps: up while too many latents fire, else down."""
    schedule = _schedule(
        steps=50, sparsity="l1", sparsity_coefficient=2.0, sparsity_warmup_steps=3, target_l0=4
    )
    found = []
    for l0 in (9.0, 9.0, 9.0, 5.0, 4.0, 3.0, 9.0):
        found.append(float(schedule.coefficient()))
        schedule.advance(torch.tensor(l0))
    assert found == pytest.approx([2 / 3, 4 / 3, 2, 2.4, 2.88, 2.4, 2], rel=1e-6)


@pytest.mark.parametrize(
    ("sparsity", "target"), [("target_l0", 4.0), ("l1", None)], ids=["its-own-aim", "no-aim"]
)
def test_else_the_coefficient_stays(sparsity: str, target: float | None) -> None:
    given: Any = {"sparsity": sparsity, "target_l0": target, "sparsity_warmup_steps": 0}
    schedule = _schedule(sparsity_coefficient=2.0, **given)
    for _ in range(5):
        schedule.advance(torch.tensor(9.0))
        assert schedule.coefficient() == 2


@pytest.mark.parametrize("way", ["sparse", "dense", "autograd"])
def test_the_steps_hand_over_their_l0(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ARCHITECTURES["relu-l1"]
    case = dataclasses.replace(case, train={**case.train, "steps": 20, "target_l0": 10.0})
    step = route_of(case, way, "cpu", monkeypatch)
    want = 0.4
    for i in range(6):
        x, _ = batch(case, seed=i)
        x = x if i % 2 else 0.01 * x  # few fire, then many
        result = step(x - 5.0 * (1 - i % 2), lr=0.0)
        want *= 1.5 if float(result.l0) > 10 else 1 / 1.5
        assert float(step.schedule.coefficient()) == pytest.approx(want, rel=1e-6)


WAYS = ("sparse", "dense", "dense-tiles", "autograd")


@pytest.mark.parametrize("name", ["relu-lp", "relu-weighted-lp", "gated-weighted-lp"])
@pytest.mark.parametrize("way", WAYS)
def test_every_pass_sees_the_same(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay, so that the sums of all ten steps can be had from the formulas at once."""
    case = ARCHITECTURES[name]
    case = dataclasses.replace(case, train={**case.train, "steps": 24, "p_steps": 3})  # 0.6 at 12
    step = route_of(case, way, "cpu", monkeypatch)
    sums = {1.0: 0.0, 0.6: 0.0}
    for i in range(12):
        x, _ = batch(case, seed=i)
        if i >= 2:
            penalised = _penalised(step, x)
            sums = {p: total + _sums([penalised], p) for p, total in sums.items()}
        if isinstance(step, FusedStep):
            step.dense_next = way != "sparse"
        step(x, lr=0.0)
    assert (step.schedule.step, step.schedule.p) == (12, pytest.approx(0.6))
    # The sums: B F codes a step, each off by a few roundings of fp32.
    assert step.schedule.factor == pytest.approx(sums[1.0] / sums[0.6], rel=1e-5)
    assert step.schedule.coefficient() == pytest.approx(0.4 * sums[1.0] / sums[0.6], rel=1e-5)


def _penalised(step: FusedStep | AutogradStep, x: Tensor) -> Tensor:
    """The codes (of a gated SAE the gate's) times the norms, if those weigh."""
    sae = step.sae
    with torch.no_grad():
        f = (sae.centred(x).double() @ sae.W_enc.double().T + sae.b_enc).relu()
        if step.objective.sparsity_norm_weighted:
            f = f * decoder_norm(sae.W_dec.double(), "joint", 1)
    return f


@pytest.mark.parametrize("way", ["sparse", "dense", "autograd"])
def test_the_penalty_is_steady_where_p_changes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one and the same batch it is the same before and after, whatever p was and is."""
    case = ARCHITECTURES["relu-weighted-lp"]
    case = dataclasses.replace(case, train={**case.train, "steps": 60, "p_steps": 4})
    step = route_of(case, way, "cpu", monkeypatch)
    x, _ = batch(case)
    losses = []
    for _ in range(58):
        if isinstance(step, FusedStep):
            step.dense_next = way == "dense"
        losses.append(float(step(x, lr=0.0).loss))
    assert step.schedule.p == pytest.approx(1 - 2 * 0.8 / 3)
    assert losses == pytest.approx([losses[0]] * 58, rel=1e-5)
    assert step.schedule.factor < 0.95 or step.schedule.factor > 1.05


def test_the_warmup_reaches_both_routes_and_both_passes() -> None:
    """With codes that are known the penalty is the loss less the squared error."""
    given = {"sparsity": "l1", "sparsity_coefficient": 8.0, "sparsity_warmup_steps": 4}
    train = settings(ReLUConfig, loss="mse", auxk_alpha=0, compute="float32", **given)
    sae = ReLUSAE(ReLUConfig(2, 2, subtract_b_dec=False, unit_norm_decoder=False))
    for route in ROUTES.values():
        for dense in (False, True):
            with torch.no_grad():
                for name in ("W_enc", "W_dec"):
                    sae.get_parameter(name).copy_(torch.eye(2))
            step = stepping(route, sae, train)
            found = []
            for _ in range(5):
                if isinstance(step, FusedStep):
                    step.dense_next = dense
                found.append(float(step(torch.ones(B, 2), lr=0.0).loss))
            assert found == [4, 8, 12, 16, 16]  # x_hat is x; two codes of 1 a token
