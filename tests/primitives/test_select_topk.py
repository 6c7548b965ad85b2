"""select_topk on every backend and ISA variant against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from encoding import DTYPES, cases, dtypes, flushed, from_bits, payloads, scales
from refusals import needs

from sae_kernels import gpu
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.testing import (
    CASES,
    Case,
    assert_bitwise,
    assert_same_selection,
    assert_selects,
    oracles,
    rounding,
)

PRIMITIVES = ("select_topk",)
by_name = {case.name: case for case in CASES}


def select(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    backend: str,
    by_magnitude: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects, or skips with what the backend says against such a call."""
    narrow = torch.float16 if rank_scale is None else torch.bfloat16
    if gpu.interpreted() and x.dtype in (torch.float16, narrow):
        pytest.skip("Triton's interpreter is slow and what differs here is tested in other cases")
    arguments = (x, W, b, k, rank_scale, None, by_magnitude)
    needs("select_topk", x.dtype, backend, arguments)
    values, indices = select_topk(*arguments, backend=backend)
    return values, indices


def check(
    case: Case,
    backend: str,
    rank_scale: torch.Tensor | None = None,
    by_magnitude: bool = False,
) -> None:
    """Selects and compares with the oracle."""
    x, W, b = case.inputs()
    values, indices = select(x, W, b, case.K, rank_scale, backend, by_magnitude)
    assert_selects(
        case,
        values,
        indices,
        rank_scale,
        by_magnitude=by_magnitude,
        flushed=flushed(backend, case.dtype, x, W),
    )


@cases
@dtypes
def test_against_the_oracle(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case.cast(dtype), backend)


@cases
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_rank_scale_changes_the_order_and_not_the_values(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    case = case.cast(dtype)
    check(case, backend, scales(case.F))


@cases
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_magnitudes_rank_and_values_keep_their_sign(case: Case, scaled: bool, backend: str) -> None:
    check(case, backend, scales(case.F) if scaled else None, by_magnitude=True)


@dtypes
@pytest.mark.parametrize("rows", [3, 40])
def test_magnitudes_of_either_sign_tie_to_the_lower_latent(
    dtype: torch.dtype, rows: int, backend: str
) -> None:
    W = torch.tensor([1.0, -4.0, 2.0, 4.0, -2.0, 0.0, -torch.inf, torch.nan])[:, None].to(dtype)
    x = torch.ones(rows, 1, dtype=dtype)
    values, indices = select(x, W, None, 6, None, backend, by_magnitude=True)
    assert indices.tolist() == [[7, 6, 1, 3, 2, 4]] * rows
    assert values[0, 1:].tolist() == [-torch.inf, -4.0, 4.0, 2.0, -2.0]


@dtypes
def test_error_is_like_that_of_torch_in_the_same_dtype(dtype: torch.dtype, backend: str) -> None:
    # The worst-case bound forgives too much: here the rms error. n roundings at random give about
    # 0.4 u sqrt(n) |terms|_2; torch's own product, which sums in blocks, sets the other yardstick.
    case = Case("rms", 64, 512, 200, 16, dtype=dtype)
    x, W, b = case.inputs()
    values, indices = select(x, W, b, case.K, None, backend)
    exact = oracles.scores(x, W, b).h
    high = values.dtype
    ours = values.double() - exact.gather(1, indices.long())
    torch_error = (x.to(high) @ W.T.to(high) + b).double() - exact
    terms = (x.double().square() @ W.double().square().T).sqrt()
    expected = torch.finfo(high).eps / 2 * case.D**0.5 * terms.square().mean().sqrt()
    assert ours.square().mean().sqrt() <= max(expected, 2 * torch_error.square().mean().sqrt())


@payloads
def test_nan_of_any_payload_ranks_first(payload: int, backend: str) -> None:
    x = torch.ones(3, 1)
    W = torch.tensor([5.0, torch.inf, 0.0, 9.0, 0.0, 1.0])[:, None]
    W[2] = W[4] = from_bits(payload)
    values, indices = select(x, W, None, 4, None, backend)
    assert indices.tolist() == [[2, 4, 1, 3]] * 3
    assert values[0].isnan().tolist() == [True, True, False, False]
    assert values[0, 2:].tolist() == [torch.inf, 9.0]


def test_columns_of_minus_infinity_come_last_in_latent_order(backend: str) -> None:
    W = torch.full((300, 2), -torch.inf)
    W[[7, 250]] = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    values, indices = select(torch.ones(2, 2), W, None, 5, None, backend)
    assert indices.tolist() == [[250, 7, 0, 1, 2]] * 2
    assert values[0].tolist() == [2.0, 1.0, -torch.inf, -torch.inf, -torch.inf]


def test_ascending_scores_overflow_every_candidate_buffer(backend: str) -> None:
    # Every entry beats all before it, so nothing is ever below the threshold.
    n = 700 if gpu.interpreted() else 5000
    W = torch.arange(float(n))[:, None]
    values, indices = select(torch.ones(2, 1), W, None, 9, None, backend)
    assert indices.tolist() == [list(range(n - 1, n - 10, -1))] * 2
    assert values[1].tolist() == indices[1].tolist()


def test_many_equal_exponents(backend: str) -> None:
    # More than 4096 keys in one bucket of a radix histogram, told apart by low bits only.
    n = 1500 if gpu.interpreted() else 6000
    W = (1 + torch.arange(n) * 2**-20)[torch.randperm(n)][:, None]
    _, indices = select(torch.ones(1, 1), W, None, 33, None, backend)
    assert indices[0].tolist() == W.flatten().argsort(descending=True)[:33].tolist()


@dtypes
def test_repeats_and_thread_counts_are_bitwise_equal(dtype: torch.dtype, isa: str) -> None:
    case = Case("repeats", 90, 40, 600, 12, dtype=dtype)
    first = select_topk(*case.inputs(), case.K, None, backend="cpu")
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        for name, a, b in zip(
            ("values", "indices"),
            select_topk(*case.inputs(), case.K, None, backend="cpu"),
            first,
            strict=True,
        ):
            assert_bitwise(f"{name}, repeat {repeat}", a, b)


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 31, 32, 65])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, rows: int, backend: str) -> None:
    if backend in ("reference", "cuda"):
        pytest.skip("a library's product may round differently for another number of rows")
    case = Case("rows", 140, 50, 300, 10, dtype=dtype)
    x, W, b = case.inputs()
    whole = select(x, W, b, case.K, None, backend)
    part = select(x[70 : 70 + rows], W, b, case.K, None, backend)
    assert_bitwise("values", part[0], whole[0][70 : 70 + rows])
    assert_bitwise("indices", part[1], whole[1][70 : 70 + rows])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_permuting_latents_permutes_the_selection(dtype: torch.dtype, backend: str) -> None:
    case = Case("permuted", 30, 32, 333, 11, dtype=dtype)
    x, W, b = case.inputs()
    assert b is not None
    order = torch.randperm(case.F)
    _, indices = select(x, W, b, case.K, None, backend)
    _, permuted = select(x, W[order], b[order], case.K, None, backend)
    exact = oracles.scores(x, W, b)
    budget = rounding(case.D + 1, exact.magnitude, dtype, flushed=1.0)
    assert_same_selection("permuted", order[permuted.long()], exact.key, case.K, budget)
    # A score does not depend on the latent's place but in a library's product: the same order.
    if backend not in ("reference", "cuda"):
        assert_bitwise("latents", order[permuted.long()], indices.long())


@dtypes
def test_selections_nest_in_k(dtype: torch.dtype, isa: str) -> None:
    x, W, b = Case("nested", 20, 48, 500, 1, dtype=dtype).inputs()
    values, indices = select_topk(x, W, b, 500, None, backend="cpu")
    for k in (1, 2, 31, 32, 33, 64, 255, 499):
        fewer = select_topk(x, W, b, k, None, backend="cpu")
        assert_bitwise(f"values for k={k}", fewer[0], values[:, :k])
        assert_bitwise(f"indices for k={k}", fewer[1], indices[:, :k])


def test_scaling_by_a_power_of_two_scales_the_values(isa: str) -> None:
    x, W, b = by_name["plain"].inputs()
    values, indices = select_topk(x, W, b, 8, None, backend="cpu")
    scaled = select_topk(x * 8, W, b * 8, 8, None, backend="cpu")
    assert_bitwise("values", scaled[0], values * 8)
    assert_bitwise("indices", scaled[1], indices)


@dtypes
def test_a_floor_changes_only_what_is_below_it(dtype: torch.dtype, backend: str) -> None:
    """Tokens' floors are each of their keys in turn, some beyond all, infinite or NaN."""
    case = Case("floor", 60, 40, 600, 12, dtype=dtype)
    x, W, b = case.inputs()
    beyond = torch.tensor([1e9, torch.inf, -torch.inf, torch.nan])
    for some in (slice(0, 30), slice(0, 16), slice(30, 31), slice(31, 60)):
        # Of as many rows: a library's product may round differently for another number of them.
        values, indices = select(x[some], W, b, case.K, None, backend)
        floor = values.gather(1, torch.arange(len(values))[:, None] % case.K)[:, 0]
        if some.start:
            floor[:4] = beyond[: len(floor)]
        found = select_topk(x[some], W, b, case.K, None, None, False, floor, backend=backend)
        kept = ~(values < floor[:, None])
        assert ((found[0] < floor[:, None]) == ~kept).all()
        assert_bitwise("values", found[0][kept], values[kept])
        assert_bitwise("indices", found[1][kept], indices[kept])
