"""Bits per token against numpy on small codes, what they do not depend on, and real quantisers."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_kernels.codes import SparseCodes
from sae_kernels.nn import ReLUConfig, ReLUSAE, TopKConfig, TopKSAE
from sae_kernels.training import evaluate
from sae_kernels.training.description_length import DescriptionLength, DescriptionLengthSums

if TYPE_CHECKING:
    from collections.abc import Callable

N, D, F, K = 300, 6, 20, 3
EXACT = 2.0**-30  # sums of a few hundred numbers in fp64


def _sample(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, dense codes with many zeros, and decoder rows of many lengths, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    W_dec = torch.randn(F, D, **draw) * torch.rand(F, 1, **draw) * 3
    scores = torch.randn(N, F, **draw) + torch.linspace(-2, 1, F, dtype=torch.float64)
    dense = SparseCodes.from_dense(scores, K).to_dense().relu()
    dense[:, 7] = (dense[:, 7] > 0) * 1.5  # a value that never varies
    x = dense @ W_dec + 0.3 * torch.randn(N, D, **draw) + 5
    return x, dense, W_dec


def _bits(
    x: Tensor, dense: Tensor, W_dec: Tensor, batch: int = N, **options: float
) -> DescriptionLength:
    sums = DescriptionLengthSums(D, F)
    for i in range(0, len(x), batch):
        codes = SparseCodes.from_dense(dense[i : i + batch], K)
        sums.update(x[i : i + batch], dense[i : i + batch] @ W_dec, codes)
    return sums.result(W_dec.norm(dim=1), **options)


def _direct(
    x: np.ndarray, dense: np.ndarray, W_dec: np.ndarray, precision: float, coarser: float = 1.0
) -> list[float]:
    """The definitions, latent by latent and coordinate by coordinate."""
    residual = x - dense @ W_dec
    noise = precision * x.var(0).mean()
    coarse = coarser * (residual.var(0).mean() + noise)
    codes, l0 = 0.0, 0.0
    for values, row in zip(dense.T, W_dec, strict=True):
        fired = values[values != 0]
        p = len(fired) / len(values)
        l0 += p
        if 0 < p < 1:
            codes -= p * math.log2(p) + (1 - p) * math.log2(1 - p)
        if p:
            codes += p * 0.5 * math.log2(1 + fired.var() * (row @ row) / coarse)
    left = residual.var(0) + coarse * l0 / x.shape[1]
    rates = [0.5 * np.log2(1 + v / noise).sum() for v in (left, x.var(0))]
    return [codes, *rates]


@pytest.mark.parametrize("precision", [0.01, 1e-4, 1.0])
@pytest.mark.parametrize("batch", [N, 7])
def test_bits_are_their_definitions(precision: float, batch: int) -> None:
    sample = _sample()
    got = _bits(*sample, batch, precision=precision)
    want = _direct(*(t.numpy() for t in sample), precision)
    assert list(got) == pytest.approx(want, rel=EXACT)
    assert got.bits_per_token == got.bits_codes + got.bits_residual
    assert min(got) > 0


def _rescaled(x: Tensor, dense: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 1e-4 * x, dense, 1e-4 * W_dec


def _in_other_units(x: Tensor, dense: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    units = torch.linspace(0.01, 100, F, dtype=torch.float64)
    return x, dense * units, W_dec / units[:, None]


def _moved(x: Tensor, dense: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x + torch.arange(D), dense, W_dec


def _permuted(x: Tensor, dense: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    latents, tokens = torch.randperm(F, generator=generator), torch.randperm(N, generator=generator)
    return x[tokens], dense[tokens][:, latents], W_dec[latents]


@pytest.mark.parametrize("change", [_rescaled, _in_other_units, _moved, _permuted])
def test_what_the_bits_do_not_depend_on(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> None:
    sample = _sample()
    assert list(_bits(*change(*sample))) == pytest.approx(list(_bits(*sample)), rel=EXACT)


def test_ragged_codes_and_dropped_entries_count_alike() -> None:
    x, dense, W_dec = _sample()
    fired = dense.nonzero()
    offsets = torch.cat([torch.zeros(1), (dense != 0).sum(1).cumsum(0)]).int()
    values = dense[fired[:, 0], fired[:, 1]]
    ragged = SparseCodes(values, fired[:, 1].int(), F, offsets)
    sums = DescriptionLengthSums(D, F)
    sums.update(x, dense @ W_dec, ragged)
    assert (dense == 0).any(1).any()
    got = sums.result(W_dec.norm(dim=1))
    assert list(got) == pytest.approx(list(_bits(x, dense, W_dec)), rel=EXACT)


def test_a_latent_that_never_varies_costs_its_place_alone() -> None:
    """Half of the tokens: one bit; all of them or none: nothing."""
    dense = torch.zeros(N, F, dtype=torch.float64)
    dense[: N // 2, 0], dense[:, 1] = 3.0, 2.0
    x = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert _bits(x, dense, torch.ones(F, D).double()).bits_codes == pytest.approx(1, rel=EXACT)


def test_finer_is_dearer_and_a_worse_sae_is_too() -> None:
    x, dense, W_dec = _sample()
    bits = [_bits(x, dense, W_dec, precision=p).bits_per_token for p in (1e-1, 1e-2, 1e-3)]
    assert bits == sorted(bits)
    # Far below the residual a halved precision costs every coordinate 1/2 bit, with or without.
    fine, finer = (_bits(x, dense, W_dec, precision=p) for p in (1e-9, 0.5e-9))
    assert finer.bits_residual - fine.bits_residual == pytest.approx(D / 2, rel=1e-6)
    assert finer.bits_without_sae - fine.bits_without_sae == pytest.approx(D / 2, rel=1e-6)
    assert _bits(x, dense, 0.5 * W_dec).bits_per_token > _bits(x, dense, W_dec).bits_per_token


def test_sparse_activations_are_cheaper_through_their_own_dictionary() -> None:
    """And the values' precision is the one that makes the sum least."""
    generator = np.random.default_rng(0)
    n, d, f, k = 4000, 64, 256, 4
    W_dec = generator.normal(size=(f, d))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    dense = np.zeros((n, f))
    for row in dense:
        row[generator.choice(f, k, replace=False)] = generator.exponential(10, size=k)
    x = dense @ W_dec + 0.3 * generator.normal(size=(n, d))
    sums = DescriptionLengthSums(d, f)
    codes = SparseCodes.from_dense(torch.from_numpy(dense), k)
    sums.update(torch.from_numpy(x), torch.from_numpy(dense @ W_dec), codes)
    bits = sums.result(torch.ones(f))
    assert bits.bits_per_token < 0.5 * bits.bits_without_sae
    totals = [sum(_direct(x, dense, W_dec, 0.01, c)[:2]) for c in (0.5, 1, 2)]
    assert totals[1] == min(totals) == pytest.approx(bits.bits_per_token, rel=EXACT)


@pytest.mark.parametrize("name", ["normal", "laplace", "exponential", "uniform"])
@pytest.mark.parametrize("noise", [4.0, 0.1, 1e-3])
def test_a_quantiser_takes_no_more_than_the_rate(name: str, noise: float) -> None:
    """A scalar one with known dither, of any of these: at most 1/2 log2(2 pi e / 12) above it."""
    generator = np.random.default_rng(0)
    values = getattr(generator, name)(size=50_000)
    step = math.sqrt(12 * noise)
    entropies = []
    for dither in np.linspace(0, 1, 16, endpoint=False):
        _, counts = np.unique(np.round(values / step + dither), return_counts=True)
        p = counts / counts.sum()
        entropies.append(-(p * np.log2(p)).sum())
    rate = 0.5 * math.log2(1 + values.var() / noise)
    # The entropy of a sample of n in b bins falls short of the true one, by b / (2 n ln 2) or so.
    assert np.mean(entropies) <= rate + 0.5 * math.log2(2 * math.pi * math.e / 12)


@pytest.mark.parametrize("scale", [1.0, 2.7])
def test_evaluate_reports_them_in_units_of_the_raw_activations(scale: float) -> None:
    x = torch.randn(N, 16, generator=torch.Generator().manual_seed(0))
    sae = TopKSAE(TopKConfig(16, 64, 4, activation_scale=scale))
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 64)[:, None])
        codes = sae.encode(x).to_dense().double().numpy()
    rows = sae.W_dec.detach().double().numpy() / scale
    got, folded = evaluate(sae, x, batch_size=64), evaluate(sae.folded(), x)
    want = _direct(x.double().numpy(), codes, rows, 0.01)
    # Values and residuals come in fp32.
    for measured, tolerance in ((got, 1e-6), (folded, 1e-5)):
        bits = [measured.bits_codes, measured.bits_residual, measured.bits_without_sae]
        assert bits == pytest.approx(want, rel=tolerance)
    assert got.scalars()["bits_per_token"] == got.bits_codes + got.bits_residual


def test_evaluate_takes_other_architectures_and_leaves_their_mode() -> None:
    x = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    sae = ReLUSAE(ReLUConfig(8, 32)).train()
    measured = evaluate(sae, x)
    assert measured.l0 == pytest.approx(
        float((sae.encode(x).to_dense() > 0).sum(1).double().mean())
    )
    assert measured.bits_codes > 0
    assert sae.training
    config = dataclasses.replace(sae.config, d_out=8, subtract_b_dec=False)
    with pytest.raises(
        ValueError, match=r"expected one for a transcoder.* got none for a transcoder"
    ):
        evaluate(ReLUSAE(config), x)


def test_activations_that_do_not_vary_have_no_bits() -> None:
    sums = DescriptionLengthSums(D, F)
    sums.update(torch.ones(4, D), torch.ones(4, D), SparseCodes.from_dense(torch.ones(4, F), 2))
    assert all(map(math.isnan, sums.result(torch.ones(F))[1:]))


@pytest.mark.parametrize("precision", [0.0, -1.0, math.nan])
def test_refusals(precision: float) -> None:
    with pytest.raises(ValueError, match="precision: expected a positive number, got"):
        _bits(*_sample(), precision=precision)
    with pytest.raises(ValueError, match="at least one token, got none"):
        DescriptionLengthSums(D, F).result(torch.ones(F))
