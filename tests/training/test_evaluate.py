"""Evaluation against its definitions, in fp64 and all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.testing import assert_bitwise
from sae_kernels.training import Evaluation, evaluate
from tests.step.harness import B, D, F, K, Variant, build, tokens

if TYPE_CHECKING:
    from pathlib import Path

N = 1000


def _trained(**sae: object) -> TopKSAE:
    step = build(Variant(dict(sae)))
    for i in range(30):
        step(tokens(B, seed=i), lr=5e-3)
    return step.sae


def _direct(sae: TopKSAE, x: Tensor) -> dict[str, float | Tensor]:
    """Everything from the definitions, given what the SAE puts out."""
    with torch.no_grad():
        x_hat, codes = sae(x)
    x, x_hat, dense = x.double(), x_hat.double(), codes.to_dense()
    error = (x - x_hat).square().sum()
    if sae.config.relu == "none":
        fired = torch.zeros_like(dense).scatter(1, codes.indices.long(), 1.0) > 0
    else:
        fired = dense > 0
    density = fired.double().mean(0)
    fvu = float(error / (x - x.mean(0)).square().sum())
    ratios = (x - x_hat).square().sum(1) / (x - x.mean(0)).square().sum(1)
    return {
        "fvu": fvu,
        "row_fvu": float(ratios.mean()),
        "explained_variance": 1 - fvu,
        "mse": float(error / len(x)),
        "l0": float(fired.double().sum(1).mean()),
        "cosine": float(torch.cosine_similarity(x, x_hat).mean()),
        "dead_fraction": float((density == 0).double().mean()),
        "dense_fraction": float((density > 0.1).double().mean()),
        "latent_density": density.float(),
    }


def _assert_close(got: Evaluation, want: dict[str, float | Tensor]) -> None:
    """Counts are exact. x - x_hat is formed in fp32, its square summed in fp64: two roundings."""
    for name in ("l0", "dead_fraction", "dense_fraction"):
        assert getattr(got, name) == pytest.approx(want[name], rel=1e-14), name
    assert_bitwise("density", got.latent_density, want["latent_density"])
    for name in ("fvu", "row_fvu", "explained_variance", "mse"):
        assert getattr(got, name) == pytest.approx(want[name], rel=2**-21), name
    # A dot product and two norms over D, in fp32.
    assert got.cosine == pytest.approx(want["cosine"], abs=2 * D * 2.0**-24)


@pytest.mark.parametrize(
    "options",
    [{}, {"relu": "none"}, {"activation_scale": 2.7}, {"k": 100}],
    ids=["default", "without-relu", "scaled", "zeros-kept"],
)
def test_measures_are_their_definitions(options: dict[str, object]) -> None:
    sae, x = _trained(**options), tokens(N, seed=77)
    got = evaluate(sae, x)
    assert got.n_tokens == N
    assert 0 < got.fvu < 1
    _assert_close(got, _direct(sae, x))


@pytest.mark.parametrize("batch_size", [1000, 999, 137, 64])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    sae, x = _trained(), tokens(N, seed=77)
    _assert_close(evaluate(sae, x, batch_size=batch_size), _direct(sae, x))


def test_the_mean_is_that_of_the_evaluated_set() -> None:
    """A constant reconstruction of that mean has an FVU of 1, wherever the set lies."""
    x = tokens(N, seed=77) + 5
    sae = TopKSAE(TopKConfig(D, F, K))
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x.mean(0))
    # b_dec is the mean to fp32, an offset that adds only its square.
    assert evaluate(sae, x, batch_size=10).fvu == pytest.approx(1.0, abs=2**-20)
    assert evaluate(sae, x[:500]).fvu > 1.0


def _axes(k: int) -> TopKSAE:
    """An SAE that keeps the k coordinates of the largest size."""
    sae = TopKSAE(TopKConfig(D, 2 * D, k))
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec):
            weights.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.b_dec.zero_()
        sae.b_enc.zero_()
    return sae


def test_a_few_enormous_rows_do_not_hide_the_others() -> None:
    """1 of 128 rows has 100 times the norm and is reconstructed perfectly."""
    x = torch.randn(1280, D, generator=torch.Generator().manual_seed(0))
    sinks = torch.arange(1280) % 128 == 5
    x[sinks] = 100 * D**0.5 * torch.eye(D)[0] * torch.tensor([1.0, -1.0]).repeat(5)[:, None]
    sae = _axes(D // 2)
    got, normal = evaluate(sae, x), evaluate(sae, x[~sinks])
    assert got.fvu < 0.003 < 0.05 < normal.fvu
    # The sinks count as rows without error; the mean of all is near that of the others, 0.
    assert got.row_fvu == pytest.approx(normal.row_fvu * 127 / 128, rel=0.02)
    assert normal.row_fvu == pytest.approx(normal.fvu, rel=0.05)


def test_rows_at_the_mean_have_nothing_to_explain() -> None:
    """The mean is (0, 0): two rows lie there, of which the SAE makes something nonetheless."""
    x = torch.zeros(4, D)
    x[0, 0], x[1, 0] = 2.0, -2.0
    sae = _axes(1)
    with torch.no_grad():
        sae.b_dec[1] = 1.0
    sae.b_enc.data.copy_(sae.W_enc.data @ torch.tensor([0.0, 1.0] + [0.0] * (D - 2)))
    want = (x[:2] - sae(x[:2]).x_hat.detach()).square().sum(1) / 4
    got = evaluate(sae, x, batch_size=3)
    assert float(want.sum()) > 0
    assert got.row_fvu == pytest.approx(float(want.mean()))
    still = evaluate(sae, torch.ones(5, D))
    assert still.row_fvu != still.row_fvu  # NaN: nothing varies


def test_nan_is_not_hidden() -> None:
    x = tokens(N, seed=77)
    x[17, 3] = torch.nan
    got = evaluate(_trained(), x)
    assert got.fvu != got.fvu
    assert got.row_fvu != got.row_fvu


def test_a_mean_far_away_costs_no_digits() -> None:
    """The variance comes from sums in fp64; in fp32 nothing would be left of it."""
    x = 0.01 * torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 1000
    sae = TopKSAE(TopKConfig(D, F, K))
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    want = float((x - sae(x).x_hat.detach()).double().square().sum())
    want /= float((x.double() - x.double().mean(0)).square().sum())
    # Squares of 1e6 in fp64 (2^-53), against a variance of 1e-4: 1e10 2^-53 N, generously.
    assert evaluate(sae, x, batch_size=64).fvu == pytest.approx(want, rel=1e10 * 2.0**-53 * N)


def test_a_tensor_and_shards_are_evaluated_alike(tmp_path: Path) -> None:
    sae, x = _trained(), tokens(300, seed=77)
    with ShardWriter(tmp_path, D, rows_per_shard=70) as writer:
        writer.write(x)
    a = evaluate(sae, x)
    for source in (ShardDataset(tmp_path), tmp_path, str(tmp_path)):
        b = evaluate(sae, source)
        assert a.scalars() == b.scalars()
        assert_bitwise("density", a.latent_density, b.latent_density)


def test_what_is_read_once_is_refused() -> None:
    with pytest.raises(TypeError, match="as they are read more than once, got list"):
        evaluate(TopKSAE(TopKConfig(D, F, K)), [torch.zeros(3, D)])


def test_half_precision_rows_are_the_numbers_they_hold() -> None:
    sae, x = _trained(), tokens(200, seed=77).bfloat16()
    assert evaluate(sae, x).scalars() == evaluate(sae, x.float()).scalars()


def test_evaluating_leaves_no_trace() -> None:
    sae, x = _trained(), tokens(200, seed=77)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    for mode in (False, True):
        sae.train(mode)
        scalars = evaluate(sae, x).scalars()
        assert sae.training is mode
    assert "latent_density" not in scalars
    assert all(isinstance(value, (int, float)) for value in scalars.values())
    for name, p in sae.named_parameters():
        assert_bitwise(name, p.data, before[name])
        assert p.grad is None


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, D + 1), "as wide as the SAE's d_in 32, got 33"),
        (torch.zeros(0, D), "expected at least one row to evaluate on, got none"),
        (torch.zeros(2, 3, D), r"expected floating point activations \[N, D\]"),
    ],
    ids=["wide", "empty", "three-dimensions"],
)
def test_bad_sources_are_named(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(TopKSAE(TopKConfig(D, F, K)), x)
