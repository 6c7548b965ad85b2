"""Matching pursuit SAEs against the dense fp64 oracle, and what does not serve them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import (
    MatchingPursuitConfig,
    MatchingPursuitObjective,
    MatchingPursuitSAE,
    SparseAutoencoder,
)
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing.dense_pursuit import dense_pursuit
from sae_kernels.training import evaluate, resample_dead_, train
from tests.settings import settings
from tests.step.harness import tokens

D, F, B = 9, 40, 24
CASES: dict[str, dict[str, Any]] = {
    "plain": {"k": 5},
    "one": {"k": 1},
    # More steps than dimensions, with rows of any length: latents come again.
    "repeats stop": {"k": 30, "unit_norm_decoder": False},
    "repeats add up": {"k": 30, "stop_on_repeat": False},
    "a threshold": {"k": 30, "residual_threshold": 0.5, "stop_on_repeat": False},
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def _made(options: dict[str, Any]) -> tuple[MatchingPursuitSAE, Tensor]:
    sae = MatchingPursuitSAE(D, F, **options).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_dec.copy_(0.3 * torch.randn(D, generator=g))
        if not sae.config.unit_norm_decoder:
            sae.W_dec.mul_(0.4 + 0.6 * torch.rand(F, 1, generator=g))
    return sae, torch.randn(B, D, generator=g, dtype=torch.float64)


def _oracle(sae: MatchingPursuitSAE, x: Tensor) -> Tensor:
    config = sae.config
    return dense_pursuit(
        x,
        sae.W_dec,
        sae.b_dec,
        config.k,
        residual_threshold=config.residual_threshold,
        stop_on_repeat=config.stop_on_repeat,
    )


@cases
def test_codes_and_gradients_are_the_oracles(options: dict[str, Any]) -> None:
    sae, x = _made(options)
    weights = torch.randn(B, F, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for codes_of in (lambda: sae.encode(x).to_dense(), lambda: _oracle(sae, x)):
        sae.zero_grad()
        codes = codes_of()
        x_hat = codes @ sae.W_dec + sae.b_dec
        ((codes * weights).sum() + (x_hat - x).square().sum()).backward()
        assert sae.W_dec.grad is not None
        assert sae.b_dec.grad is not None
        found.append((codes.detach(), x_hat.detach(), sae.W_dec.grad, sae.b_dec.grad.clone()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae(x).x_hat, found[1][1])


def test_the_cases_repeat_and_stop() -> None:
    """Else they would say nothing."""
    kept = {name: _oracle(*_made(options)).count_nonzero(1) for name, options in CASES.items()}
    assert kept["plain"].max() == 5
    assert (kept["repeats stop"] < 30).any()
    assert (kept["repeats add up"] < 30).any()
    sae, x = _made(CASES["a threshold"])
    left = x - _oracle(sae, x) @ sae.W_dec - sae.b_dec
    assert (left.norm(dim=1) < 0.5).all()
    assert (kept["a threshold"] < kept["repeats add up"]).any()


@cases
def test_some_latents_alone_are_those_of_all(options: dict[str, Any]) -> None:
    sae, x = _made(options)
    some = [3, 0, 39]
    dense = sae.encode(x).to_dense()
    assert torch.equal(sae.encode_latents(x, some), dense[:, some])
    assert torch.equal(sae.fires(x, some), dense[:, some] != 0)
    assert torch.equal(sae.encode(x.view(4, 6, D)).to_dense().flatten(0, 1), dense)


def test_a_scale_folds_into_the_weights() -> None:
    sae = MatchingPursuitSAE(D, F, k=20, residual_threshold=0.5, activation_scale=0.3)
    x = 10 * torch.randn(B, D, generator=torch.Generator().manual_seed(3))
    folded = sae.folded()
    assert folded.config.residual_threshold == 0.5 / 0.3
    torch.testing.assert_close(folded(x).x_hat, sae(x).x_hat)
    torch.testing.assert_close(folded.encode(x).values * 0.3, sae.encode(x).values)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
def test_a_frozen_copy_has_the_codes(dtype: torch.dtype | None) -> None:
    sae = MatchingPursuitSAE(D, F, k=4)
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(3))
    frozen, expected = sae.for_inference(dtype), sae(x)
    if dtype is torch.bfloat16:
        torch.testing.assert_close(frozen(x).x_hat, expected.x_hat, rtol=0, atol=0.1)
    else:
        assert torch.equal(frozen(x).codes.indices, expected.codes.indices)
        torch.testing.assert_close(frozen(x).x_hat, expected.x_hat)


def test_saved_and_loaded_it_is_the_same(tmp_path: Any) -> None:
    sae = MatchingPursuitSAE(D, F, k=4, residual_threshold=0.1)
    sae.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.config == sae.config
    assert sorted(again.state_dict()) == ["W_dec", "b_dec"]
    x = torch.randn(5, D)
    assert torch.equal(again(x).x_hat, sae(x).x_hat)


def test_a_step_has_the_gradient_of_the_loss() -> None:
    sae, objective = MatchingPursuitSAE(D, F, k=5), MatchingPursuitObjective()
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(4))
    double = MatchingPursuitSAE(D, F, k=5).double()
    double.load_state_dict(sae.state_dict())
    x_hat = _oracle(double, x.double()) @ double.W_dec + double.b_dec
    loss = (x_hat - x).square().sum() / (x - x.mean(0)).double().square().sum()
    loss.backward()
    double.remove_parallel_gradient_()
    step = AutogradStep(sae, objective)
    assert float(step(x, lr=0.0).loss) == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(
            parameter.grad, double.get_parameter(name).grad, check_dtype=False, rtol=1e-4, atol=1e-6
        )


def test_it_trains_and_dead_latents_start_anew() -> None:
    x, config = tokens(2000), MatchingPursuitConfig(32, 64, k=4)
    before = evaluate(MatchingPursuitSAE(config), x).fvu
    run = settings(config, steps=60, batch_size=128, lr=3e-3, route="autograd", auxk_alpha=0.0)
    assert evaluate(train(config, x, run).sae, x).fvu < 0.7 * before
    step = AutogradStep(MatchingPursuitSAE(config), MatchingPursuitObjective(dead_after_tokens=1))
    step(x[:100], lr=1e-3)
    step.dead.since_fired[[3, 9]] = 1
    assert set(resample_dead_(step, x[:100]).tolist()) >= {3, 9}
    torch.testing.assert_close(step.sae.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.full
def test_it_is_one_graph_of_torch_compile() -> None:
    sae = MatchingPursuitSAE(D, F, k=4)
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(4))
    torch._dynamo.reset()
    compiled = torch.compile(sae, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x).x_hat, sae(x).x_hat)
    compiled(x).x_hat.square().sum().backward()
    assert sae.W_dec.grad is not None


def test_what_does_not_serve_it() -> None:
    sae = MatchingPursuitSAE(D, F, k=4)
    with pytest.raises(ValueError, match=r"one product .* MatchingPursuitSAE; train it with Au"):
        FusedStep(sae)
    with pytest.raises(ValueError, match="auxk_alpha: expected 0 with matching pursuit"):
        AutogradStep(sae, MatchingPursuitObjective(auxk_alpha=0.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subtract_b_dec": False}, "subtract_b_dec: expected true with matching pursuit"),
        ({"subtract_b_dec": False, "skip": True}, "subtract_b_dec: expected true"),
        ({"subtract_b_dec": False, "d_out": 3}, "subtract_b_dec: expected true"),
        ({"n_layers": 2}, "n_layers: expected 1 with matching pursuit, got 2"),
    ],
)
def test_settings_that_it_has_not(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MatchingPursuitConfig(D, F, **changes)
