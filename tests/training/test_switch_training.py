"""What is a Switch SAE's own in training: a frozen bias, k annealing, busy and idle experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.nn import SwitchConfig, SwitchSAE, TopKConfig, TopKSAE
from sae_kernels.testing import assert_bitwise
from sae_kernels.training import train
from sae_kernels.training.start import make_step
from tests.settings import settings
from tests.step.harness import tokens

if TYPE_CHECKING:
    from sae_kernels.config import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step import TrainingStep

ROUTES = ("fused", "autograd")

D, F, K, E, B = 16, 48, 4, 4, 64
LR = 3e-3


def config(**options: Any) -> SwitchConfig:
    return SwitchConfig(D, F, k=K, n_experts=options.pop("n_experts", E), **options)


def config_of(sae: Any = SwitchSAE, **options: Any) -> TrainConfig:
    return settings(sae, **{"compute": "float32", "auxk_alpha": 0.0, **options})


def step_of(sae: SparseAutoencoder, route: str = "fused", **options: Any) -> TrainingStep:
    return make_step(sae, config_of(sae, route=route, **options))


@pytest.mark.parametrize("route", ROUTES)
def test_without_encoder_bias_it_stays_zero_and_all_else_learns(route: str) -> None:
    sae = SwitchSAE(config(encoder_bias=False))
    start = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    # Clipping looks at the gradients too; AuxK has one of its own for b_enc.
    options = {"clip_norm": 0.1, "auxk_alpha": 0.25, "dead_after_tokens": B}
    step = step_of(sae, route, balance_coefficient=0.3, **options)
    for i in range(4):
        assert not step(tokens(B, seed=i, d_in=D), lr=LR).skipped
    for name, tensor in sae.state_dict().items():
        if name == "b_enc":
            assert not tensor.any()
        else:
            assert (tensor != start[name]).any(), name


@pytest.mark.parametrize("route", ROUTES)
def test_one_expert_trains_as_topk_does(route: str) -> None:
    """With one expert the gate is 1, and the router has nothing to learn."""
    routed, plain = SwitchSAE(config(n_experts=1)), TopKSAE(TopKConfig(D, F, K))
    plain.load_state_dict({n: t for n, t in routed.state_dict().items() if "router" not in n})
    router = routed.W_router.detach().clone()
    steps = [step_of(sae, route) for sae in (routed, plain)]
    for i in range(10):
        x = tokens(B, seed=i, d_in=D)
        ours, theirs = (step(x, lr=LR) for step in steps)
        assert_bitwise("loss", ours.loss[None], theirs.loss[None])
    for name, tensor in plain.state_dict().items():
        assert_bitwise(name, routed.get_parameter(name), tensor)
    assert_bitwise("W_router", routed.W_router, router)


@pytest.mark.parametrize("route", ROUTES)
def test_idle_experts_are_left_alone(route: str) -> None:
    """All tokens go to one expert: the others' latents have no gradient."""
    sae = SwitchSAE(config())
    with torch.no_grad():
        sae.W_router.zero_()  # equal logits: the first expert wins
    W_enc = sae.W_enc.detach().clone()
    step = step_of(sae, route)
    result = step(tokens(B, d_in=D), lr=LR)
    assert (sae.W_enc[: F // E] != W_enc[: F // E]).any()
    assert_bitwise("others", sae.W_enc[F // E :], W_enc[F // E :])
    assert not result.fired[F // E :].any()
    assert sae.step_figures(result.fired) == {"largest_load": 1.0}


def test_fewer_tokens_than_experts() -> None:
    step = step_of(SwitchSAE(config(n_experts=12)), balance_coefficient=0.3)
    result = step(tokens(2, d_in=D), lr=LR)
    assert not result.skipped
    assert int((result.fired > 0).sum()) <= 2 * K


def test_the_balance_loss_spreads_tokens_that_all_went_to_one_expert() -> None:
    x = tokens(2048, d_in=D)
    sae = SwitchSAE(config(gate="heaviside"))
    with torch.no_grad():
        sae.b_router.copy_(-sae.W_router[0] * 20)  # expert 0 is ahead of all others
    before = sae.encode(x).routing.load()  # type: ignore[attr-defined]
    step = step_of(sae, balance_coefficient=1.0)
    for _ in range(300):
        step(x, lr=1e-2)
    after = sae.encode(x).routing.load()  # type: ignore[attr-defined]
    assert float(before.max()) > 0.9
    assert float(after.max()) < 0.5


def test_k_start_must_fit_an_expert() -> None:
    options = {"k_start": 13, "k_anneal_steps": 2, "steps": 3, "batch_size": 32}
    with pytest.raises(ValueError, match=r"k_start: expected at most 12, .* got 13"):
        train(config(), tokens(100, d_in=D), config_of(**options))


def test_metric_lines_have_the_largest_load() -> None:
    result = train(config(), tokens(500, d_in=D), config_of(steps=4, batch_size=100, log_every=2))
    for line in result.metrics:
        assert 1 / E <= line["largest_load"] <= 1


def test_a_nan_in_a_router_that_only_chooses_shows_in_the_loss() -> None:
    sae = SwitchSAE(config(gate="heaviside"))
    with torch.no_grad():
        sae.W_router[1, 0] = torch.nan
    step = step_of(sae)
    result = step(tokens(B, d_in=D), lr=LR)
    assert result.loss.isnan()
    assert result.skipped
