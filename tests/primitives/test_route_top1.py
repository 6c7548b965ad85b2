"""route_top1 on every backend and ISA variant against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from drawn import LAYOUTS
from encoding import DTYPES, cases, dtypes, flushed, from_bits, needs, payloads, sample

from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.route_top1 import route_top1
from sae_kernels.testing import (
    Case,
    assert_bitwise,
    assert_same_selection,
    assert_within,
    oracles,
    rounding,
    softmax_budget,
)

PRIMITIVES = ("route_top1",)
inf, nan = torch.inf, torch.nan


def route(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes, or skips with what the backend says against such a call."""
    needs("route_top1", x.dtype, backend, (x, W, b))
    experts, probabilities = route_top1(x, W, b, backend=backend)
    assert (experts.dtype, probabilities.dtype) == (torch.int32, accumulator(x.dtype))
    return experts, probabilities


def one_token(logits: torch.Tensor, backend: str) -> tuple[int, list[float]]:
    """The expert and the probabilities of a token with these logits."""
    experts, probabilities = route(torch.ones(1, 1), logits[:, None], None, backend)
    return int(experts[0]), probabilities[0].tolist()


def check(case: Case, backend: str, layout: str = "packed") -> None:
    """Routes to the case's latents as experts and compares with the oracle."""
    x, W, b = case.inputs()
    place = LAYOUTS[layout]
    experts, probabilities = route(place(x), place(W), b, backend)
    exact = oracles.scores(x, W, b)
    lost = flushed(backend, case.dtype, x, W)
    budget = rounding(case.D + 1, exact.magnitude, case.dtype, flushed=lost)
    chosen = experts.long()[:, None]
    if case.exact:
        assert_bitwise("experts", chosen, oracles.selection(exact.h, 1))
        budget = torch.zeros_like(budget)
    else:
        assert_same_selection("experts", chosen, exact.h, 1, budget)
    wanted = exact.h.softmax(1)
    assert_within(
        "probabilities", probabilities, wanted, softmax_budget(exact.h, budget, case.dtype)
    )


@cases
@dtypes
def test_against_the_oracle(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case.cast(dtype), backend)


@pytest.mark.parametrize("n_experts", sample((1, 2, 15, 16, 17, 33, 50, 64, 65, 130, 512), 4))
@pytest.mark.parametrize("kind", ["normal", "ties"])
@dtypes
def test_any_number_of_experts(n_experts: int, kind: str, dtype: torch.dtype, backend: str) -> None:
    check(Case("experts", 70, 40, n_experts, 1, kind, dtype), backend)


@pytest.mark.parametrize("size", [0.0, 30.0, 3e4], ids=str)
def test_sharp_and_flat_routers(size: float, backend: str) -> None:
    # From equal probabilities to those that are 1 or underflow.
    x, W, _ = Case("sharp", 40, 20, 24, 1).inputs()
    x = size * x
    experts, probabilities = route(x, W, None, backend)
    exact = oracles.scores(x, W, None)
    budget = rounding(21, exact.magnitude, torch.float32)
    limit = softmax_budget(exact.h, budget, torch.float32)
    assert_within("probabilities", probabilities, exact.h.softmax(1), limit)
    if size == 0:
        assert experts.tolist() == [0] * 40
        assert_within("equal ones", probabilities, torch.full((40, 24), 1 / 24), 1e-7)


@dtypes
def test_probabilities_add_up_to_one(dtype: torch.dtype, backend: str) -> None:
    x, W, b = Case("sums", 60, 30, 32, 1, dtype=dtype).inputs()
    _, probabilities = route(x, W, b, backend)
    # Each is divided by the sum of what is divided: roundings of a division (at most 4 u) and of
    # sums in two orders.
    budget = rounding(2 * 32 + 4, torch.ones(60), dtype)
    assert_within("sums", probabilities.double().sum(1), torch.ones(60).double(), budget)


def test_ties_go_to_the_lower_expert(backend: str) -> None:
    for logits, expert in (
        ([1.0, 3.0, 3.0, 2.0], 1),
        ([5.0, 5.0, 5.0], 0),
        ([-0.0, 0.0], 0),
        ([0.0, -0.0], 0),
        ([-1.0, -0.0, 0.0], 1),
    ):
        came, probabilities = one_token(torch.tensor(logits), backend)
        assert came == expert
        assert probabilities[expert] == max(probabilities)
    many = torch.zeros(130)
    many[[77, 129]] = 1
    assert one_token(many, backend)[0] == 77


@payloads
def test_nan_of_any_payload_comes_first(payload: int, backend: str) -> None:
    logits = torch.tensor([1.0, inf, 0.0, 5.0, 0.0])
    logits[2] = logits[4] = from_bits(payload)
    expert, probabilities = one_token(logits, backend)
    assert expert == 2
    assert torch.tensor(probabilities).isnan().all()
    x = torch.ones(2, 1)
    x[1] = from_bits(payload)
    experts, probabilities_of = route(x, torch.tensor([[1.0], [2.0], [-1.0]]), None, backend)
    assert experts.tolist() == [1, 0]
    assert probabilities_of.isnan().all(1).tolist() == [False, True]


@payloads
def test_nan_in_a_bias(payload: int, backend: str) -> None:
    b = torch.zeros(20)
    b[13] = from_bits(payload)
    experts, probabilities = route(torch.ones(3, 2), torch.ones(20, 2), b, backend)
    assert experts.tolist() == [13] * 3
    assert probabilities.isnan().all()


def test_infinite_logits(backend: str) -> None:
    # As torch's softmax: +inf leaves no number, -inf has no share unless there is nothing else.
    for logits, expert, finite in (
        ([0.0, inf, 3.0, inf], 1, False),
        ([-inf, 2.0, -inf, 2.0], 1, True),
        ([-inf, -inf, -inf], 0, False),
        ([3e38, -3e38, -inf], 0, True),
    ):
        came, probabilities = one_token(torch.tensor(logits), backend)
        assert came == expert
        exact = torch.tensor(logits).double().softmax(0)
        assert_within("probabilities", torch.tensor(probabilities), exact, 0.0)
        assert bool(exact.isfinite().all()) is finite


@dtypes
def test_one_expert_takes_everything(dtype: torch.dtype, backend: str) -> None:
    x, W, b = Case("alone", 37, 11, 1, 1, dtype=dtype).inputs()
    experts, probabilities = route(x, W, b, backend)
    assert experts.tolist() == [0] * 37
    assert probabilities.tolist() == [[1.0]] * 37


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str, dtype: torch.dtype, backend: str) -> None:
    check(Case("strides", 21, 19, 9, 1, dtype=dtype), backend, layout)
    # torch's product, the reference's, may round otherwise for other strides: sums must be exact.
    kind = "integer" if backend == "reference" else "normal"
    x, W, b = Case("strides", 21, 19, 9, 1, kind, dtype).inputs()
    place = LAYOUTS[layout]
    strided, packed = route(place(x), place(W), b, backend), route(x, W, b, backend)
    for name, a, e in zip(("experts", "probabilities"), strided, packed, strict=True):
        assert_bitwise(name, a, e)


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 31, 65])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, rows: int, backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's product may round differently for another number of rows")
    x, W, b = Case("rows", 140, 50, 40, 1, dtype=dtype).inputs()
    whole, part = route(x, W, b, backend), route(x[70 : 70 + rows], W, b, backend)
    assert_bitwise("experts", part[0], whole[0][70 : 70 + rows])
    assert_bitwise("probabilities", part[1], whole[1][70 : 70 + rows])


@dtypes
def test_repeats_and_thread_counts_are_bitwise_equal(dtype: torch.dtype, isa: str) -> None:
    x, W, b = Case("repeats", 290, 40, 50, 1, dtype=dtype).inputs()
    first = route_top1(x, W, b, backend="cpu")
    for repeat in range(12):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        again = route_top1(x, W, b, backend="cpu")
        assert_bitwise(f"experts, repeat {repeat}", again[0], first[0])
        assert_bitwise(f"probabilities, repeat {repeat}", again[1], first[1])
