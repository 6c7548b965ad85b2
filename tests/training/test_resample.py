"""Resampling of dead latents: which start anew, by which tokens, and that they come alive."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_kernels.nn import (
    CrossLayerTopK,
    GatedSAE,
    JumpReLUSAE,
    SparseAutoencoder,
    SwitchSAE,
    TopKConfig,
    TopKSAE,
)
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.training import resample_dead_, train
from sae_kernels.training.graphed_step import GraphedStep
from sae_kernels.training.resample import check_resampling
from tests.settings import settings
from tests.step.harness import ROUTES, D, tokens
from tests.training.test_resume import OPTIONS, data
from tests.training.test_resume import settings as resumed

F, B, AFTER = 64, 80, 1000
DEAD = [3, 17, 40]


def _step(sae: SparseAutoencoder, route: str, n_dead: int | None = None, **changes: Any) -> Any:
    """A step that was made five times, and thinks some latents dead."""
    config = settings(sae, dead_after_tokens=AFTER, **{"compute": "float32", **changes})
    step = ROUTES[route](sae, config.objective, config.optimizer, steps=100)
    for seed in range(5):
        step(tokens(B, seed), lr=1e-3)
    step.dead.since_fired.fill_(AFTER - 1)
    step.dead.since_fired[DEAD if n_dead is None else range(n_dead)] = AFTER
    return step


def _moments(step: FusedStep | AutogradStep, name: str) -> list[Tensor]:
    if isinstance(step, FusedStep):
        return [step.matrices[name].m, step.matrices[name].v]
    state = step.torch_adam.state[step.sae.get_parameter(name)]
    return [state["exp_avg"], state["exp_avg_sq"]]


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("fused", {}),
    "autograd": ("autograd", {}),
    "bf16-copies": ("fused", {"compute": "bfloat16"}),
    "split": ("fused", {"compute": "bfloat16", "master_weights": "split"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit", [True, False])
def test_dead_latents_get_the_directions_of_tokens(layout: str, unit: bool) -> None:
    route, changes = LAYOUTS[layout]
    sae = TopKSAE(D, F, k=6, activation_scale=1.7, unit_norm_decoder=unit)
    step = _step(sae, route, **changes)
    x = tokens(B, 9)
    before = {name: t.clone() for name, t in step.weights().items()}
    moments = {n: [t.clone() for t in _moments(step, n)] for n in ("W_enc", "b_enc", "W_dec")}
    assert resample_dead_(step, x).tolist() == DEAD
    after = step.weights()

    alive = [f for f in range(F) if f not in DEAD]
    directions = normalize(1.7 * x - before["b_dec"])
    cosines = normalize(after["W_dec"][DEAD]) @ directions.T
    drawn = cosines.argmax(1)
    assert len(set(drawn.tolist())) == len(DEAD)
    # A bf16 high half rounds the norms that are averaged by at most 2^-9.
    rtol = 2**-9 if layout == "split" else 1e-5
    for name, factor in (("W_enc", 0.2), ("W_dec", 1.0)):
        length = factor * before[name][alive].norm(dim=1).mean()
        want = length * directions[drawn]
        torch.testing.assert_close(after[name][DEAD], want, rtol=rtol, atol=rtol * float(length))
    assert (after["b_enc"][DEAD] == 0).all()
    for name, was in moments.items():
        assert torch.equal(after[name][alive], before[name][alive])
        for now, then in zip(_moments(step, name), was, strict=True):
            assert (now[DEAD] == 0).all()
            assert (then[DEAD] != 0).any()
            assert torch.equal(now[alive], then[alive])
        if isinstance(step, FusedStep):
            operand = step.adam.operand(name)
            assert torch.equal(operand, after[name].view_as(operand).to(operand.dtype))
    assert torch.equal(after["b_dec"], before["b_dec"])
    assert step.dead.since_fired.tolist() == [0 if f in DEAD else AFTER - 1 for f in range(F)]
    assert bool(step(x, lr=1e-3).loss.isfinite())


def test_a_crosscoders_layers_keep_their_norms() -> None:
    sae = TopKSAE(D // 2, F, k=6, n_layers=2)
    step = _step(sae, "fused")
    resample_dead_(step, tokens(B, 9))
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(F, 2))


def test_a_transcoders_decoder_writes_what_the_skip_leaves() -> None:
    sae = TopKSAE(D, F, k=6, d_out=5, skip=True, subtract_b_dec=False, unit_norm_decoder=False)
    config = settings(sae, dead_after_tokens=AFTER, compute="float32")
    step = FusedStep(sae, config.objective, config.optimizer)
    x, target = tokens(B), tokens(B, 1)[:, :5]
    step(x, target=target, lr=1e-3)
    sae.W_skip.data.normal_()
    step.dead.since_fired[DEAD] = AFTER
    resample_dead_(step, x, target)
    drawn = (normalize(sae.W_enc[DEAD]) @ normalize(x).T).argmax(1)
    left = target[drawn] - x[drawn] @ sae.W_skip.T - sae.b_dec
    torch.testing.assert_close(normalize(sae.W_dec[DEAD]), normalize(left))


@pytest.mark.parametrize("kind", [JumpReLUSAE, GatedSAE])
def test_other_numbers_of_a_latent_are_the_mean_of_live_ones(kind: type[SparseAutoencoder]) -> None:
    step = _step(kind(D, F), "fused")
    names = {"log_threshold"} if kind is JumpReLUSAE else {"r_mag", "b_mag"}
    alive = [f for f in range(F) if f not in DEAD]
    with torch.no_grad():
        for name in names:
            step.sae.get_parameter(name).uniform_(0.1, 0.9)
    means = {name: step.sae.get_parameter(name)[alive].mean() for name in names}
    resample_dead_(step, tokens(B))
    for name, mean in means.items():
        torch.testing.assert_close(step.sae.get_parameter(name)[DEAD], mean.expand(len(DEAD)))


def test_tokens_are_drawn_by_their_squared_loss() -> None:
    """With a decoder of zeros a token's loss is its squared norm."""
    sae = TopKSAE(4, 8, k=2)
    config = settings(sae, dead_after_tokens=AFTER, compute="float32")
    step = FusedStep(sae, config.objective, config.optimizer)
    sae.W_dec.data.zero_()
    x = torch.diag(torch.tensor([1.0, 1.2, 1.4, 0.0]))
    counts, n = torch.zeros(4), 800
    for draw in range(n):
        step.schedule.step = draw
        step.dead.since_fired[5] = AFTER
        assert resample_dead_(step, x).tolist() == [5]
        counts[sae.W_enc[5].argmax()] += 1
    p = torch.diag(x) ** 4 / (torch.diag(x) ** 4).sum()
    assert ((counts - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt()).all()
    assert counts[3] == 0


def test_no_token_is_drawn_twice_nor_one_that_is_not_finite() -> None:
    step = _step(TopKSAE(D, F, k=6), "fused", n_dead=20)
    step.dead.since_fired[7:12] += 1
    x = tokens(6, 9)
    x[2, 0] = torch.nan
    assert resample_dead_(step, x).tolist() == list(range(7, 12))  # those dead longest
    rows = step.sae.W_enc[7:12]
    assert rows.isfinite().all()
    assert torch.linalg.matrix_rank(rows) == 5
    assert not resample_dead_(step, x[2:3]).numel()


def test_where_all_are_dead_norms_are_those_of_all() -> None:
    step = _step(TopKSAE(D, F, k=6), "fused", n_dead=F)
    assert len(resample_dead_(step, tokens(B, 9))) == F
    torch.testing.assert_close(step.sae.decoder_norms()[:, 0], torch.ones(F))


def test_the_draw_depends_on_seed_and_step_alone() -> None:
    drawn: list[Tensor] = []
    for route, seed, made in (("fused", 0, 5), ("fused", 0, 5), ("fused", 1, 5), ("fused", 0, 6)):
        step = _step(TopKSAE(D, F, k=6), route)
        step.seed, step.schedule.step = seed, made
        torch.rand(seed + made + len(drawn))  # the global generator is another every time
        resample_dead_(GraphedStep(step) if len(drawn) == 1 else step, tokens(B, 9))
        drawn.append(step.sae.W_enc[DEAD].detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


@pytest.mark.parametrize("route", ["fused", pytest.param("autograd", marks=pytest.mark.full)])
def test_dead_latents_come_alive(route: str) -> None:
    """Half of the latents can never fire; AuxK, which would bring them back, is off."""
    source, sae = tokens(4000), TopKConfig(D, F, k=6)
    results = {}
    for every in (None, 25):
        module = TopKSAE(sae)
        module.b_enc.data[: F // 2] = -100.0
        module.is_fresh = False
        config = settings(
            sae,
            steps=200,
            batch_size=128,
            lr=3e-3,
            compute="float32",
            auxk_alpha=0.0,
            dead_after_tokens=1500,
            normalize_activations="none",
            route=route,
            resample_every=every,
        )
        results[every] = train(module, source, config)
    without, resampled = results[None], results[25]
    assert without.dead[: F // 2].all()
    assert resampled.dead.float().mean() < 0.1
    assert resampled.metrics[-1]["fvu"] < 0.9 * without.metrics[-1]["fvu"]


@pytest.mark.parametrize("option", [name for name in OPTIONS if "resampled" in name])
def test_the_runs_that_are_resumed_resample(option: str) -> None:
    sae, config = resumed("topk", **OPTIONS[option])
    never = dataclasses.replace(config, resample_every=None)
    weights = [train(sae, data("topk")["source"], c).sae.W_dec for c in (config, never)]
    assert not torch.equal(*weights)


class _OwnDecoder(TopKSAE):
    decodes_by_rows = False


@dataclasses.dataclass
class _OwnStep:
    sae: SparseAutoencoder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: AutogradStep(CrossLayerTopK(8, 64, n_layers=2, d_out=8, k=4)),
            "one row of W_dec each, for every token, got CrossLayerTopK",
        ),
        (lambda: FusedStep(SwitchSAE(8, 64, n_experts=4, k=4)), "got SwitchSAE"),
        (lambda: AutogradStep(_OwnDecoder(8, 64, k=4)), "got _OwnDecoder"),
        (lambda: _OwnStep(TopKSAE(8, 64, k=4)), "FusedStep or an AutogradStep, got a _OwnStep"),
    ],
)
def test_what_has_no_dead_rows_to_set_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_resampling(make())


def test_a_run_is_refused_before_its_first_step() -> None:
    sae = SwitchSAE(D, 64, n_experts=4, k=4)
    config = settings(sae, resample_every=2, batch_size=50)
    steps: list[int] = []
    with pytest.raises(ValueError, match="resample_every: expected an architecture"):
        train(sae, tokens(200), config, on_step=lambda i, _: steps.append(i))
    assert not steps
