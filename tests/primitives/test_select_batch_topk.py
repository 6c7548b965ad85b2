"""select_batch_topk on every backend and ISA variant against the fp64 oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from encoding import (
    DTYPES,
    cases,
    dtypes,
    flushed,
    from_bits,
    needs,
    payloads,
    sample,
    scales,
)

from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.select_batch_topk import select_batch_topk
from sae_kernels.primitives.select_threshold import select_threshold
from sae_kernels.testing import CASES, Case, assert_bitwise, assert_selects_batch, oracles
from sae_kernels.testing.oracles import Ragged

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PRIMITIVES = ("select_batch_topk", "select_threshold")
NAMES = Ragged._fields
inf, nan = torch.inf, torch.nan
some_dtypes = pytest.mark.parametrize(
    "dtype", sample(DTYPES[:2], 1), ids=lambda dtype: str(dtype)[6:]
)


def select(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    count: int,
    rank_scale: torch.Tensor | None,
    backend: str,
    start: torch.Tensor | None = None,
) -> Ragged:
    """Selects, or skips with what the backend says against such a call."""
    arguments = (x, W, b, count, rank_scale, start)
    needs("select_batch_topk", x.dtype, backend, arguments)
    values, indices, offsets = select_batch_topk(*arguments, backend=backend)
    assert values.dtype == accumulator(x.dtype)
    assert indices.dtype == offsets.dtype == torch.int32
    return Ragged(values, indices, offsets)


def computed(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, backend: str
) -> torch.Tensor:
    """[B, F]: the positive scores as the backend itself computes them, -inf where not positive."""
    bounds = torch.zeros(W.shape[0], dtype=accumulator(x.dtype))
    needs("select_threshold", x.dtype, backend, (x, W, b, bounds))
    values, indices, offsets = select_threshold(x, W, b, bounds, backend=backend)
    h = torch.full((x.shape[0], W.shape[0]), -inf, dtype=values.dtype)
    h[oracles.tokens(indices, offsets), indices.long()] = values
    return h


def assert_equal(came: Ragged, wanted: Ragged) -> None:
    """Raises AssertionError unless both are the same codes, bit for bit."""
    for name, a, e in zip(NAMES, came, wanted, strict=True):
        assert_bitwise(name, a, e)


def counts_of(case: Case) -> Sequence[int]:
    """K a token, one, none, and more than there are scores."""
    return sample((case.B * case.K, 1, 0, case.B * case.F + 3), 1)


@cases
@dtypes
def test_against_the_oracle(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = case.cast(dtype)
    x, W, b = case.inputs()
    for count in counts_of(case):
        came = select(x, W, b, count, None, backend)
        assert_selects_batch(case, came, count, flushed=flushed(backend, dtype, x, W))


@cases
@some_dtypes
def test_rank_scale_changes_the_order_and_not_the_values(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    case = case.cast(dtype)
    x, W, b = case.inputs()
    scale = scales(case.F)
    for count in counts_of(case):
        came = select(x, W, b, count, scale, backend)
        assert_selects_batch(case, came, count, scale, flushed=flushed(backend, dtype, x, W))


@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=lambda case: case.name)
@some_dtypes
def test_exact_cases_equal_the_reference(case: Case, dtype: torch.dtype, backend: str) -> None:
    x, W, b = case.cast(dtype).inputs()
    for scale in (None, scales(case.F)):
        for count in counts_of(case):
            came = select(x, W, b, count, scale, backend)
            wanted = select(x, W, b, count, scale, "reference")
            for name, a, e in zip(NAMES, came, wanted, strict=True):
                assert_bitwise(name, a.nan_to_num(-1.0), e.nan_to_num(-1.0))  # of any payload


def starts(cut: float, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Guesses that are right, nearly right, far too low, far too high and absurd."""
    for factor in (1.0, 1 - 1e-6, 1 + 1e-6, 1 / 0.9, 0.5, 1e-6, 1.2, 2.0, 3.9, 1e6, 0.0, -1.0):
        yield torch.tensor(factor * cut, dtype=dtype)
    for absurd in (inf, -inf, nan, torch.finfo(dtype).max, torch.finfo(dtype).tiny):
        yield torch.tensor(absurd, dtype=dtype)
    yield torch.tensor(1e300, dtype=torch.float64)  # more than fp32 holds
    yield torch.tensor(3)


@pytest.mark.parametrize("case", sample(CASES, 9), ids=lambda case: case.name)
@pytest.mark.parametrize("scaled", [False, True], ids=["h", "scaled"])
@some_dtypes
def test_a_start_never_changes_a_bit(
    case: Case, scaled: bool, dtype: torch.dtype, backend: str
) -> None:
    case = case.cast(dtype)
    x, W, b = case.inputs()
    scale = torch.rand(case.F) + 0.2 if scaled else None
    if scale is not None:
        scale[::6] = 0
    count = case.B * case.K
    h = computed(x, W, b, backend)
    key = h if scale is None else h * scale
    wanted = oracles.ragged(h, oracles.batch_topk(h, key, count))
    kept_keys = key[oracles.batch_topk(h, key, count)].nan_to_num(inf, inf)
    cut = float(kept_keys.min()) if kept_keys.numel() else 1.0
    assert_equal(select(x, W, b, count, scale, backend), wanted)
    for start in sample(list(starts(cut if cut < inf else 1.0, torch.float32)), 2):
        came = select(x, W, b, count, scale, backend, start)
        for name, a, e in zip(NAMES, came, wanted, strict=True):
            assert_bitwise(f"{name}, start {float(start)}", a, e)


# The largest finite number, the least normal one and a subnormal, of both signs, and special ones.
EXTREMES = (3.4e38, 2.0**-126, 2.0**-140, -3.4e38, -(2.0**-140), inf, -inf, nan, 0.0, -0.0)


@pytest.mark.parametrize("n_scales", [3, len(EXTREMES)], ids=["finite", "special"])
@pytest.mark.parametrize("start", [None, 2.0**-145, 2.0**-126, 1.0, 2.0**99, 1e38], ids=str)
def test_rank_scales_of_any_size(n_scales: int, start: float | None, backend: str) -> None:
    # Bounds of h overflow, or lose their digits, where the scale is extreme.
    def extreme(*shape: int) -> torch.Tensor:
        exponents = torch.randint(-149, 128, shape).double()
        return ((1 + torch.rand(*shape).double()) * 2**exponents).float()

    W, scale = extreme(200, 1), extreme(200)
    W[::9], W[1::9] = inf, nan
    special = torch.tensor(EXTREMES[:n_scales]).repeat(67)[:200]
    for rank_scale in (scale, special, torch.where(torch.rand(200) < 0.5, scale, special)):
        h = computed(torch.ones(3, 1), W, None, backend)
        for count in sample((50, 1, 5, 300, 150, 900), 2):
            kept = oracles.batch_topk(h, h * rank_scale, count)
            guess = None if start is None else torch.tensor(start)
            came = select(torch.ones(3, 1), W, None, count, rank_scale, backend, guess)
            assert_equal(came, oracles.ragged(h, kept))


def test_every_bound_around_the_cut(backend: str) -> None:
    # So also those that one entry too few is above, whichever share of the start a bound is.
    W = torch.arange(1, 101).float()[:, None]
    for start in sample(torch.arange(1, 1000, 0.9), 20):
        came = select(torch.ones(1, 1), W, None, 10, None, backend, start)
        assert came.indices.tolist() == list(range(90, 100)), f"start {float(start)}"


def test_a_key_that_is_rounded_above_the_bound(backend: str) -> None:
    # Scores that are not above bound / scale, but whose product with the scale is above the bound.
    start = torch.tensor(3.3)
    bound = (0.9 * start.double()).float()
    scale = 0.5 + torch.rand(300)
    h = bound / scale
    above = bound.nextafter(torch.tensor(inf))
    assert 0 < int((h * scale == above).sum()) < 300
    assert not bool((h * scale > above).any())
    W, scale = torch.cat([h, above[None]])[:, None], torch.cat([scale, torch.ones(1)])
    expected = int((h * scale[:-1] == above).nonzero()[0])
    came = select(torch.ones(1, 1), W, None, 1, scale, backend, start)
    assert came.indices.tolist() == [expected]


def test_a_bound_that_lost_its_digits(backend: str) -> None:
    # start / scale is rounded up to the score itself, which a bound then would leave out.
    W = torch.tensor([11 * 2.0**-149, 10.8 * 2.0**-23])[:, None]
    scale = torch.tensor([2.0**126, 1.0])
    start = torch.tensor(10.6 * 2.0**-23 / 0.9)
    assert select(torch.ones(1, 1), W, None, 1, scale, backend, start).indices.tolist() == [0]


def test_ties_go_to_the_lower_token_and_then_the_lower_latent(backend: str) -> None:
    x, W = torch.tensor([[1.0], [2.0], [1.0]]), torch.tensor([[1.0], [1.0], [2.0], [1.0]])
    # The score 4 is there once; 2 is in all tokens and 1 in the first and the last.
    for count, latents, offsets in (
        (1, [2], [0, 0, 1, 1]),
        (3, [2, 0, 2], [0, 1, 3, 3]),
        (5, [2, 0, 1, 2, 3], [0, 1, 5, 5]),
        (6, [2, 0, 1, 2, 3, 2], [0, 1, 5, 6]),
        (8, [0, 1, 2, 0, 1, 2, 3, 2], [0, 3, 7, 8]),
        (10, [0, 1, 2, 3, 0, 1, 2, 3, 0, 2], [0, 4, 8, 10]),
    ):
        came = select(x, W, None, count, None, backend)
        assert came.indices.tolist() == latents
        assert came.offsets.tolist() == offsets


def test_a_tie_is_by_key_and_not_by_value(backend: str) -> None:
    W, scale = torch.tensor([8.0, 4.0, 2.0, 1.0])[:, None], torch.tensor([1.0, 2.0, 4.0, 16.0])
    came = select(torch.ones(2, 1), W, None, 4, scale, backend)
    assert came.indices.tolist() == [0, 1, 3, 3]  # 16 twice, then the first two of the keys 8
    assert came.values.tolist() == [8.0, 4.0, 1.0, 1.0]


def test_fewer_positives_than_count(backend: str) -> None:
    W = torch.tensor([1.0, -2.0, 0.0, 3.0])[:, None]
    x = torch.tensor([[1.0], [-1.0], [0.0]])
    for count in (3, 4, 12, 10**9):
        came = select(x, W, None, count, None, backend)
        assert came.values.tolist() == [1.0, 3.0, 2.0]
        assert came.indices.tolist() == [0, 3, 1]
        assert came.offsets.tolist() == [0, 2, 3, 3]


def test_a_scale_of_zero_keeps_nothing_but_nan(backend: str) -> None:
    W = torch.tensor([1.0, inf, nan, 5.0, -inf])[:, None]
    scale = torch.zeros(5)
    came = select(torch.ones(2, 1), W, None, 7, scale, backend)
    assert came.indices.tolist() == [1, 2] * 2  # the key of an infinite score is NaN
    scale[3] = 1
    came = select(torch.ones(2, 1), W, None, 5, scale, backend)
    assert came.indices.tolist() == [1, 2, 3, 1, 2]


def test_a_score_below_zero_is_never_kept(backend: str) -> None:
    scale = torch.tensor([-1.0, -inf, nan, 1.0])
    W = torch.tensor([-5.0, -5.0, -5.0, 2.0])[:, None]
    came = select(torch.ones(1, 1), W, None, 4, scale, backend)
    assert came.indices.tolist() == [3]


@payloads
def test_nan_of_any_payload_comes_first(payload: int, backend: str) -> None:
    x = torch.ones(3, 1)
    W = torch.tensor([5.0, inf, 0.0, 9.0, 0.0, 1.0])[:, None]
    W[2] = W[4] = from_bits(payload)
    for count, latents in (
        (2, [2, 4]),
        (5, [2, 4, 2, 4, 2]),
        (7, [1, 2, 4, 2, 4, 2, 4]),
        (10, [1, 2, 3, 4, 1, 2, 4, 1, 2, 4]),
    ):
        came = select(x, W, None, count, None, backend)
        assert came.indices.tolist() == latents
        assert came.values.isnan().tolist() == [latent in (2, 4) for latent in latents]


def test_a_batch_of_one_loud_token(backend: str) -> None:
    # The sample that a start is guessed from does not see it.
    x = torch.full((700, 1), 0.01)
    x[333] = 100
    W = torch.arange(1, 301).float()[:, None]
    came = select(x, W, None, 290, None, backend)
    assert came.offsets.diff().nonzero().flatten().tolist() == [333]
    assert came.indices.tolist() == list(range(10, 300))


@dtypes
def test_repeats_and_thread_counts_are_bitwise_equal(dtype: torch.dtype, isa: str) -> None:
    case = Case("repeats", 190, 40, 300, 12, dtype=dtype)
    arguments = (*case.inputs(), 12 * 190, None, None)
    first = select_batch_topk(*arguments, backend="cpu")
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        again = select_batch_topk(*arguments, backend="cpu")
        for name, a, b in zip(NAMES, again, first, strict=True):
            assert_bitwise(f"{name}, repeat {repeat}", a, b)


@dtypes
def test_selections_nest_in_count(dtype: torch.dtype, backend: str) -> None:
    case = Case("nested", 20, 48, 130, 1, dtype=dtype)
    x, W, b = case.inputs()
    h = computed(x, W, b, backend)
    larger = torch.zeros(case.B, case.F, dtype=torch.bool)
    for count in (1, 2, 31, 64, 500, 1200, 10_000):
        came = select(x, W, b, count, None, backend)
        kept = torch.zeros_like(larger)
        kept[oracles.tokens(came.indices, came.offsets), came.indices.long()] = True
        assert not bool((larger & ~kept).any()), f"count {count} leaves out what fewer kept"
        assert_bitwise("values", came.values, h[kept])
        larger = kept


def test_a_count_of_one_token_is_its_top_k(backend: str) -> None:
    case = Case("one-token", 1, 40, 400, 20)
    x, W, b = case.inputs()
    h = computed(x, W, b, backend)
    came = select(x, W, b, 20, None, backend)
    assert came.indices.tolist() == h.topk(20).indices[0].sort().values.tolist()
