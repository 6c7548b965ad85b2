"""The screen's certificate in fp64 against scores that the kernels compute in fp32."""

from __future__ import annotations

from functools import partial

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from sae_kernels.backends.cpu import Screening
from sae_kernels.primitives.select_topk import cpu
from sae_kernels.testing import screening


def scores(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """All scores of the fp32 kernel, each in its latent's place."""
    values, indices = cpu.run(x, W, None, W.shape[0], None, screening=Screening.NONE)
    return torch.empty_like(values).scatter_(1, indices.long(), values).double()


def assert_bounded(x: torch.Tensor, W: torch.Tensor, pairs: bool = False) -> torch.Tensor:
    """Returns how much of the bound the worst scores use."""
    bounds = screening.score_bounds(x, W, tokens=partial(screening.narrow, pairs=pairs))
    off = (scores(x, W) - bounds.score).abs()
    # The bound itself is computed in fp64, whose rounding is 2^-29 of what it allows for.
    assert bool((off <= bounds.error * (1 + 1e-9)).all())
    return off / bounds.error.clamp(min=torch.finfo(torch.float64).tiny)


@hypothesis.given(
    B=st.integers(1, 9),
    D=st.integers(1, 300),
    F=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    pairs=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_no_score_is_beyond_its_bound(
    B: int, D: int, F: int, spread: float, pairs: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    columns = torch.exp(spread * torch.randn(D))  # some columns hold most of a row
    W = torch.randn(F, D) * torch.exp(torch.randn(F, 1))
    assert_bounded(torch.randn(B, D) * columns, W, pairs)


@hypothesis.given(D=st.integers(1, 300), power=st.integers(0, 8), seed=st.integers(0, 2**20))
def test_sums_of_pairs_fit_16_bits(D: int, power: int, seed: int) -> None:
    # From rows of one magnitude, whose sums are the largest, to rows with a few large elements.
    torch.manual_seed(seed)
    q = screening.narrow(torch.randn(40, D).sign() * torch.rand(40, D) ** power, pairs=True).q
    two, eight = screening.pair_sums(q)
    assert int(two.max()) * 255 < 2**15  # two products by unsigned bytes do not saturate
    assert int(eight.max()) * 127 < 2**15  # eight by signed ones do not wrap


def test_a_bound_is_met_where_all_that_was_lost_points_one_way() -> None:
    # Latents a little less than half a step above what they are rounded to, wherever the token is
    # positive: nothing of Cauchy and Schwarz is lost, but for the two largest elements.
    x = torch.full((1, 512), 127.0)
    W = torch.full((1, 512), 1.49)
    W[:, 0] = 127.0
    assert assert_bounded(x, W).item() == pytest.approx(1, rel=2e-3)


@pytest.mark.parametrize(("pairs", "share"), [(False, 0.45), (True, 0.65)])
def test_bounds_are_of_use_on_random_rows(pairs: bool, share: float) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(64, 768), torch.randn(512, 768)
    used = assert_bounded(x, W, pairs)
    assert 0.1 < float(used.max()) < 0.5
    bounds = screening.score_bounds(x, W, tokens=partial(screening.narrow, pairs=pairs))
    assert float(bounds.error.mean() / bounds.score.std()) < share
