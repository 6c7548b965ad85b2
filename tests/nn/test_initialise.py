"""Where training starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import TopKConfig, TopKSAE, geometric_median
from sae_kernels.nn.initialise import unit_rows
from sae_kernels.testing import assert_bitwise, assert_within, gamma


def _distances(point: Tensor, x: Tensor) -> float:
    return float((x.double() - point.double()).norm(dim=1).sum())


@pytest.mark.parametrize(
    ("rows", "median"),
    [
        ([[3.0, -2.0]], [3.0, -2.0]),
        ([[5.0, 5.0]] * 4, [5.0, 5.0]),
        ([[0.0], [0.0], [9.0]], [0.0]),  # a row with most of the weight is the median
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, -3.0], [0.0, 3.0]], [0.0, 0.0]),  # the crossing point
        # The Fermat point of the right isosceles triangle: (3 - sqrt 3) / 6 on either axis.
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0.2113249, 0.2113249]),
        # An angle of at least 120 degrees: its own corner.
        ([[0.0, 0.0], [10.0, 1.0], [-10.0, 1.0]], [0.0, 0.0]),
    ],
    ids=["one-row", "all-equal", "majority", "cross", "fermat-point", "obtuse-corner"],
)
def test_known_medians(rows: list[list[float]], median: list[float]) -> None:
    got = geometric_median(torch.tensor(rows), iterations=2000)
    # It stops when a step is under 1e-6 of the norm; steps shrink geometrically.
    assert got.tolist() == pytest.approx(median, abs=1e-4)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_start_on_a_row_is_left(offset: float) -> None:
    """The mean of these is the third row, the median is the fourth: plain Weiszfeld stays put."""
    x = torch.tensor([[-6.0], [-1.0], [0.0], [1.0], [2.0], [2.0], [2.0]]) + offset
    assert float(x.mean()) == offset
    assert float(geometric_median(x)) == pytest.approx(1.0 + offset, abs=2e-4 * max(1, offset))


def test_the_median_has_the_least_sum_of_distances() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g)
    x[:20] *= 50  # outliers drag the mean, hardly the median
    median = geometric_median(x)
    least = _distances(median, x)
    assert least < _distances(x.mean(0), x)
    for _ in range(50):
        step = 0.01 * torch.nn.functional.normalize(torch.randn(6, generator=g), dim=0)
        assert _distances(median + step, x) > least


def test_half_precision_samples_do_not_overflow() -> None:
    x = torch.tensor([[3e4], [3e4], [6e4]], dtype=torch.float16)
    got = geometric_median(x)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([3e4], rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (5,), (2, 2, 2)], ids=str)
def test_geometric_median_of_nothing_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[N, D\] with N > 0, got \["):
        geometric_median(torch.zeros(shape))


def test_decoder_rows_are_random_unit_vectors_and_the_encoder_their_copy() -> None:
    sae = TopKSAE(TopKConfig(48, 3000, 4), seed=5)
    assert_bitwise("tied", sae.W_enc.data, sae.W_dec.data)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    norms = sae.W_dec.data.double().norm(dim=1)
    assert_within("norms", norms, torch.ones(3000), gamma(48 + 3, torch.float32))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    # Uniform on the sphere: components of mean 0 and variance 1 / D, within 5 standard errors.
    entries = sae.W_dec.data.double().flatten()
    assert abs(float(entries.mean())) < 5 * (1 / 48 / entries.numel()) ** 0.5
    assert float(entries.square().mean()) == pytest.approx(1 / 48, rel=1e-6)
    largest_mean = entries.view(3000, 48).mean(0).abs().max()
    assert float(largest_mean) < 5 * (1 / 48 / 3000) ** 0.5


def test_seeds_name_the_weights() -> None:
    config = TopKConfig(8, 20, 2)
    first = TopKSAE(config, seed=1)
    torch.manual_seed(99)  # the global generator has no part in it
    assert_bitwise("seed 1", TopKSAE(config, seed=1).W_dec.data, first.W_dec.data)
    assert (TopKSAE(config, seed=2).W_dec != first.W_dec).any()
    before = torch.random.get_rng_state()
    TopKSAE(config)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unit_rows_of_width_one() -> None:
    assert unit_rows(50, 1, torch.Generator().manual_seed(0)).abs().eq(1).all()
