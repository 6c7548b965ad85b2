"""select_threshold on every backend and ISA variant against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from encoding import cases, dtypes, flushed, from_bits, needs, payloads

from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.select_threshold import select_threshold
from sae_kernels.testing import (
    CASES,
    Case,
    assert_bitwise,
    assert_selects_above,
    assert_within,
    oracles,
    rounding,
)
from sae_kernels.testing.oracles import Ragged

PRIMITIVES = ("select_threshold",)
NAMES = Ragged._fields
inf, nan = torch.inf, torch.nan


def select(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, bounds: torch.Tensor, backend: str
) -> Ragged:
    """Selects, or skips with what the backend says against such a call."""
    arguments = (x, W, b, bounds)
    needs("select_threshold", x.dtype, backend, arguments)
    values, indices, offsets = select_threshold(*arguments, backend=backend)
    assert values.dtype == accumulator(x.dtype)
    assert indices.dtype == offsets.dtype == torch.int32
    return Ragged(values, indices, offsets)


def tokens_own_scores(case: Case) -> torch.Tensor:
    """Bounds that are each the score of a random token: half of all is above, some are equal."""
    h = oracles.scores(*case.inputs()).h
    if not case.B:
        return torch.zeros(case.F, dtype=accumulator(case.dtype))
    token = torch.randint(case.B, (case.F,))
    return h[token, torch.arange(case.F)].to(accumulator(case.dtype))


def test_a_screen_in_bf16_changes_no_bit_of_exact_sums(backend: str) -> None:
    if backend != "triton":
        pytest.skip("scores are screened in bf16 in Triton alone")
    from sae_kernels.primitives.select_threshold import triton

    # bf16 rounds these numbers, and sums of their products are exact in any order.
    x, W = (torch.randint(-511, 512, (n, 16)) / 512.0 for n in (9, 600))
    b, bounds = torch.zeros(600), torch.full((600,), 2.75)
    plain, screened = (triton.run(x, W, b, bounds, screened=s) for s in (False, True))
    for name, came, expected in zip(NAMES, screened, plain, strict=True):
        assert_bitwise(name, came, expected)
    passed = triton.behind_screen(x, W, b, bounds)
    assert passed is not None
    assert 0 < plain[0].numel() < passed[0].numel()


@cases
@dtypes
@pytest.mark.parametrize("bound", ["zero", "own", "lowest"])
def test_against_the_oracle(case: Case, dtype: torch.dtype, bound: str, backend: str) -> None:
    case = case.cast(dtype)
    x, W, b = case.inputs()
    bounds = torch.zeros(case.F, dtype=accumulator(dtype))
    if bound == "own":
        bounds = tokens_own_scores(case)
    elif bound == "lowest":  # every finite score is kept
        bounds.fill_(-torch.finfo(bounds.dtype).max)
    came = select(x, W, b, bounds, backend)
    assert_selects_above(case, came, bounds, flushed=flushed(backend, dtype, x, W))


@dtypes
def test_a_score_equal_to_its_bound_is_left_out(dtype: torch.dtype, backend: str) -> None:
    high = accumulator(dtype)
    x, W = torch.ones(1, 1, dtype=dtype), torch.full((40, 1), 3.0, dtype=dtype)
    bounds = torch.full((40,), 3.0, dtype=high)
    below, above = (bounds.nextafter(torch.tensor(to, dtype=high)) for to in (-inf, inf))
    bounds[1::3], bounds[2::3] = below[1::3], above[2::3]
    came = select(x, W, None, bounds, backend)
    assert came.indices.tolist() == list(range(1, 40, 3))
    assert came.values.tolist() == [3.0] * 13


@pytest.mark.parametrize(
    ("bound", "kept"),
    [
        (inf, [0]),  # nothing is above it; NaN is not comparable
        (-inf, [0, 1, 3, 4, 5, 6]),
        (nan, [0, 1, 2, 3, 4, 5, 6]),  # what is not "<=" is kept
        (torch.finfo(torch.float32).max, [0, 1]),
        (0.0, [0, 1, 3]),
        (-0.0, [0, 1, 3]),
    ],
    ids=str,
)
def test_special_scores_against_special_bounds(bound: float, kept: list[int], backend: str) -> None:
    W = torch.tensor([nan, inf, -inf, 1.0, -1.0, 0.0, -0.0])[:, None]
    came = select(torch.ones(2, 1), W, None, torch.full((7,), bound), backend)
    assert came.indices.tolist() == kept * 2
    assert came.offsets.tolist() == [0, len(kept), 2 * len(kept)]
    assert_within("values", came.values, W.flatten()[kept].repeat(2), 0.0)
    assert not bool((came.values.signbit() & (came.values == 0)).any()), "-0 is emitted as +0"


@payloads
def test_nan_of_any_payload_is_kept(payload: int, backend: str) -> None:
    W = torch.tensor([5.0, inf, 0.0, 9.0, 0.0, 1.0])[:, None]
    W[2] = W[4] = from_bits(payload)
    came = select(torch.ones(3, 1), W, None, torch.full((6,), 20.0), backend)
    assert came.indices.tolist() == [1, 2, 4] * 3
    assert came.values.isnan().tolist() == [False, True, True] * 3


@pytest.mark.parametrize("n_tokens", [0, 1, 200])
def test_nothing_above_the_bounds(n_tokens: int, backend: str) -> None:
    came = select(torch.ones(n_tokens, 3), torch.ones(70, 3), None, torch.full((70,), 3.0), backend)
    assert came.values.shape == came.indices.shape == (0,)
    assert came.offsets.tolist() == [0] * (n_tokens + 1)


def test_tokens_of_very_different_numbers_of_latents(backend: str) -> None:
    # Among many tokens without any, one with all latents and one with the last of them.
    x = torch.zeros(300, 2)
    x[71, 0], x[299, 1] = 1, 1
    W = torch.stack([torch.arange(1, 501), torch.arange(500) // 499], 1).float()
    came = select(x, W, None, torch.zeros(500), backend)
    assert came.offsets.diff().nonzero().flatten().tolist() == [71, 299]
    assert came.indices.tolist() == [*range(500), 499]
    assert came.values.tolist() == [*range(1, 501), 1.0]


@dtypes
def test_a_lower_bound_adds_entries_and_changes_none(dtype: torch.dtype, backend: str) -> None:
    case = Case("nested", 40, 31, 150, 1, dtype=dtype)
    x, W, b = case.inputs()
    least = select(x, W, b, torch.full((case.F,), -10.0, dtype=accumulator(dtype)), backend)
    for bound in (-1.0, 0.0, 0.3, 2.0):
        bounds = torch.full_like(least.values[:1], bound).expand(case.F)
        came = select(x, W, b, bounds, backend)
        stays = least.values > bound
        assert 0 < int(stays.sum()) < stays.numel()
        assert_bitwise("values", came.values, least.values[stays])
        assert_bitwise("latents", came.indices, least.indices[stays])


@dtypes
def test_repeats_and_thread_counts_are_bitwise_equal(dtype: torch.dtype, isa: str) -> None:
    case = Case("repeats", 190, 40, 300, 12, dtype=dtype)
    bounds = tokens_own_scores(case)
    first = select_threshold(*case.inputs(), bounds, backend="cpu")
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        again = select_threshold(*case.inputs(), bounds, backend="cpu")
        for name, a, b in zip(NAMES, again, first, strict=True):
            assert_bitwise(f"{name}, repeat {repeat}", a, b)


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 31, 32, 65])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, rows: int, backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's product may round differently for another number of rows")
    case = Case("rows", 140, 50, 300, 10, dtype=dtype)
    x, W, b = case.inputs()
    bounds = tokens_own_scores(case)
    whole = select(x, W, b, bounds, backend)
    part = select(x[70 : 70 + rows], W, b, bounds, backend)
    ends = whole.offsets[70 : 70 + rows + 1]
    entries = slice(int(ends[0]), int(ends[-1]))
    assert_bitwise("offsets", part.offsets, ends - ends[0])
    assert_bitwise("values", part.values, whole.values[entries])
    assert_bitwise("latents", part.indices, whole.indices[entries])


@dtypes
def test_permuting_latents_permutes_the_codes(dtype: torch.dtype, backend: str) -> None:
    case = Case("permuted", 30, 32, 333, 11, dtype=dtype)
    x, W, b = case.inputs()
    order, bounds = torch.randperm(case.F), tokens_own_scores(case)
    assert b is not None
    plain = select(x, W, b, bounds, backend)
    permuted = select(x, W[order], b[order], bounds[order], backend)
    dense = torch.zeros(case.B, case.F, dtype=plain.values.dtype)
    dense[oracles.tokens(permuted.indices, permuted.offsets), order[permuted.indices.long()]] = (
        permuted.values
    )
    exact = oracles.scores(x, W, b)
    budget = 2 * rounding(case.D + 1, exact.magnitude, dtype, flushed=1.0)
    expected = oracles.dense_codes(plain.values, plain.indices, case.F, plain.offsets)
    certain = (exact.h - bounds.double()).abs() > budget
    assert_within("values", dense[certain], expected[certain], budget[certain])
    if backend != "reference":  # a score does not depend on the latent's place
        assert_within("values", dense, expected, 0.0)


def test_scaling_by_a_power_of_two_scales_the_values(isa: str) -> None:
    case = next(case for case in CASES if case.name == "plain")
    x, W, b = case.inputs()
    bounds = tokens_own_scores(case)
    assert b is not None
    plain = select_threshold(x, W, b, bounds, backend="cpu")
    scaled = select_threshold(x * 8, W, b * 8, bounds * 8, backend="cpu")
    assert_bitwise("values", scaled[0], plain[0] * 8)
    for name, a, e in zip(NAMES[1:], scaled[1:], plain[1:], strict=True):
        assert_bitwise(name, a, e)


def test_strided_operands(backend: str) -> None:
    case = Case("strided", 20, 18, 90, 1, "integer")
    x, W, b = case.inputs()
    bounds = tokens_own_scores(case)

    def gaps(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([t, torch.full_like(t, nan)], -1)[..., 0]

    assert b is not None
    came = select(gaps(x), W.T.contiguous().T, gaps(b), gaps(bounds), backend)
    assert_selects_above(case, came, bounds)
