"""select_topk_routed on every backend and ISA variant against the fp64 oracle and select_topk."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from drawn import Drawn, problems
from encoding import DTYPES, cases, dtypes, flushed, from_bits, needs, payloads, sample

from sae_kernels import gpu
from sae_kernels.primitives import schedule
from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.select_topk_routed import select_topk_routed
from sae_kernels.testing import (
    CASES,
    Case,
    assert_bitwise,
    assert_selects_routed,
    assert_within,
    oracles,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

PRIMITIVES = ("select_topk_routed", "select_topk")
NAMES = ("values", "indices")
by_name = {case.name: case for case in CASES}
some_dtypes = pytest.mark.parametrize(
    "dtype", sample(DTYPES[:2], 1), ids=lambda dtype: str(dtype)[6:]
)
several = pytest.mark.parametrize("n_experts", [1, 2, 7], ids="E={}".format)


def divided(case: Case, n_experts: int) -> Case:
    """The case with latents that are equal parts, and as many kept as a part has at most."""
    width = max(1, case.F // n_experts)
    return dataclasses.replace(case, F=width * n_experts, K=min(case.K, width))


def unequal(n_tokens: int, n_experts: int) -> torch.Tensor:
    """Experts by popularity, as one over the rank; the last is nobody's."""
    if n_experts == 1:
        return torch.zeros(n_tokens, dtype=torch.int32)
    share = 1 / torch.arange(1, n_experts).double()
    return torch.multinomial(share.expand(max(1, n_tokens), -1), 1)[:n_tokens, 0].int()


def select(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    experts: torch.Tensor,
    n_experts: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects, or skips with what the backend says against such a call."""
    arguments = (x, W, b, k, *oracles.routes(experts, n_experts))
    needs("select_topk_routed", x.dtype, backend, arguments)
    values, indices = select_topk_routed(*arguments, backend=backend)
    assert (values.dtype, indices.dtype) == (accumulator(x.dtype), torch.int32)
    return values, indices


def check(case: Case, experts: torch.Tensor, n_experts: int, backend: str) -> None:
    """Selects and compares with the oracle."""
    x, W, b = case.inputs()
    came = select(x, W, b, case.K, experts, n_experts, backend)
    lost = flushed(backend, case.dtype, x, W)
    assert_selects_routed(case, *came, experts, n_experts, flushed=lost)


def assert_equal(came: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> None:
    """Raises AssertionError unless both are the same codes, bit for bit."""
    for name, a, e in zip(NAMES, came, wanted, strict=True):
        assert_bitwise(name, a, e)


@cases
@several
@dtypes
def test_against_the_oracle(case: Case, n_experts: int, dtype: torch.dtype, backend: str) -> None:
    if gpu.interpreted() and n_experts != 7:
        pytest.skip("Triton's interpreter is slow, and test_every_divisor has other numbers")
    case = divided(case.cast(dtype), n_experts)
    check(case, unequal(case.B, n_experts), n_experts, backend)


@pytest.mark.parametrize("n_experts", [n for n in range(1, 61) if 60 % n == 0])
@pytest.mark.parametrize("kind", ["normal", "ties"])
@some_dtypes
def test_every_divisor(n_experts: int, kind: str, dtype: torch.dtype, backend: str) -> None:
    # Up to experts of a single latent.
    case = divided(Case("divided", 45, 20, 60, 4, kind, dtype), n_experts)
    check(case, unequal(case.B, n_experts), n_experts, backend)


@cases
@dtypes
def test_one_expert_is_select_topk(case: Case, dtype: torch.dtype, backend: str) -> None:
    x, W, b = case.cast(dtype).inputs()
    experts = torch.zeros(case.B, dtype=torch.int32)
    came = select(x, W, b, case.K, experts, 1, backend)
    assert_equal(came, select_topk(x, W, b, case.K, None, backend=backend))


@pytest.mark.parametrize("case", sample(CASES, 9), ids=lambda case: case.name)
@dtypes
def test_every_row_is_select_topk_of_its_experts_latents(
    case: Case, dtype: torch.dtype, isa: str
) -> None:
    n_experts = 5
    case = divided(case.cast(dtype), n_experts)
    x, W, b = case.inputs()
    experts, width = unequal(case.B, n_experts), case.F // n_experts
    values, indices = select(x, W, b, case.K, experts, n_experts, "cpu")
    for t, e in enumerate(experts.tolist()):
        part = slice(e * width, (e + 1) * width)
        bias = None if b is None else b[part]
        wanted = select_topk(x[t : t + 1], W[part], bias, case.K, None, backend="cpu")
        assert_equal((values[t : t + 1], indices[t : t + 1]), (wanted[0], wanted[1] + part.start))


# Where 70 tokens go to 6 experts.
SPLITS = {
    "all-on-the-first": torch.zeros(70),
    "all-on-the-last": torch.full((70,), 5),
    "all-on-one": torch.full((70,), 3),
    "all-but-one": torch.cat([torch.full((69,), 2), torch.tensor([4])]),
    "in-turn": torch.arange(70) % 6,
    "in-order": torch.arange(70) * 6 // 70,
    "only-the-even": torch.arange(70) % 3 * 2,
    "around-a-tile": torch.tensor([0] * 31 + [1] * 33 + [5] * 6),
}


@pytest.mark.parametrize("split", SPLITS)
@some_dtypes
def test_unequal_splits(split: str, dtype: torch.dtype, backend: str) -> None:
    experts = SPLITS[split].int().to(torch.get_default_device())
    check(Case("split", 70, 24, 6 * 41, 9, "integer", dtype), experts, 6, backend)


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 5])
@some_dtypes
def test_fewer_tokens_than_experts(n_tokens: int, dtype: torch.dtype, backend: str) -> None:
    experts = torch.tensor([6, 2, 6, 0, 3])[:n_tokens].int()
    check(Case("few", n_tokens, 24, 8 * 30, 9, dtype=dtype), experts, 8, backend)


def test_many_tokens_of_some_experts(backend: str) -> None:
    # More than a tile or a block of them, in parts that begin anywhere.
    case = Case("tokens", 700, 12, 4 * 70, 6, "integer")
    check(case, unequal(case.B, 4), 4, backend)


def test_more_tokens_than_lists_in_cache(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_LIST_BYTES", 256 * 8 * schedule.capacity(2))
    case = Case("chunks", 700, 3, 2 * 300, 2, "integer")  # in three parts
    check(case, unequal(case.B, 3) % 2, 2, backend)


@pytest.mark.parametrize("K", [1, 100, 900])
def test_experts_that_are_wider_than_a_list(K: int, backend: str) -> None:
    # Scores that ascend: every part of an expert beats the parts before it.
    width = 9001
    W = torch.arange(2.0 * width)[:, None]
    experts = torch.tensor([1, 0, 1]).int()
    values, indices = select(torch.ones(3, 1), W, None, K, experts, 2, backend)
    best = torch.arange(width - 1, width - 1 - K, -1)
    wanted = (best[None] + width * experts[:, None]).int()
    assert_bitwise("indices", indices, wanted)
    assert_within("values", values, wanted, 0.0)
    # Equal ones: what the first part holds must stay.
    _, indices = select(torch.zeros(3, 1), W, None, K, experts, 2, backend)
    first = torch.arange(K)[None] + width * experts[:, None]
    assert_bitwise("indices of equal scores", indices, first.int())


@some_dtypes
def test_the_order_inside_an_expert_does_not_matter(dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's product may round differently for another order of rows")
    case = Case("order", 90, 40, 4 * 50, 7, dtype=dtype)
    x, W, b = case.inputs()
    tokens, starts = oracles.routes(unequal(case.B, 4), 4)
    needs("select_topk_routed", dtype, backend, (x, W, b, case.K, tokens, starts))
    wanted = select_topk_routed(x, W, b, case.K, tokens, starts, backend=backend)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        tokens[start:end] = tokens[start:end][torch.randperm(end - start)]
    assert_equal(select_topk_routed(x, W, b, case.K, tokens, starts, backend=backend), wanted)


@some_dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 65])
def test_a_row_does_not_depend_on_its_batch(rows: int, dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("torch's product may round differently for another number of rows")
    case = Case("rows", 140, 50, 3 * 80, 10, dtype=dtype)
    x, W, b = case.inputs()
    experts = unequal(case.B, 3)
    whole = select(x, W, b, case.K, experts, 3, backend)
    part = slice(70, 70 + rows)
    came = select(x[part], W, b, case.K, experts[part], 3, backend)
    assert_equal(came, (t[part] for t in whole))


def test_a_tie_goes_to_the_lower_latent(backend: str) -> None:
    W = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 3.0, 2.0, 3.0])[:, None]
    experts = torch.tensor([1, 0, 1]).int()
    values, indices = select(torch.ones(3, 1), W, None, 3, experts, 2, backend)
    assert indices.tolist() == [[5, 7, 4], [1, 2, 0], [5, 7, 4]]
    assert values.tolist() == [[3.0, 3.0, 2.0], [2.0, 2.0, 1.0], [3.0, 3.0, 2.0]]


@payloads
@pytest.mark.parametrize("where", ["x", "W", "b"])
def test_nan_of_any_payload_stays_with_its_expert(where: str, payload: int, backend: str) -> None:
    x, b = torch.ones(3, 1), torch.zeros(8)
    W = torch.tensor([5.0, torch.inf, 0.0, 9.0, 3.0, 1.0, -torch.inf, 2.0])[:, None]
    operand, at = {"x": (x, 1), "W": (W, 2), "b": (b, 2)}[where]
    operand[at] = from_bits(payload)
    experts = torch.tensor([1, 0, 1]).int()
    values, indices = select(x, W, b, 3, experts, 2, backend)
    assert indices.tolist() == [[4, 7, 5], [0, 1, 2] if where == "x" else [2, 1, 3], [4, 7, 5]]
    n = 3 if where == "x" else 1
    assert values.isnan().tolist() == [[False] * 3, [True] * n + [False] * (3 - n), [False] * 3]


def test_minus_infinity_comes_last_and_minus_zero_is_plus_zero(backend: str) -> None:
    W = torch.tensor([-torch.inf, -0.0, -torch.inf, 0.0, torch.inf, -0.0])[:, None]
    experts = torch.tensor([0, 1]).int()
    values, indices = select(torch.ones(2, 1), W, None, 3, experts, 2, backend)
    assert indices.tolist() == [[1, 0, 2], [4, 3, 5]]
    assert values.tolist() == [[0.0, -torch.inf, -torch.inf], [torch.inf, 0.0, 0.0]]
    assert not bool((values.signbit() & (values == 0)).any())


@dtypes
def test_repeats_and_thread_counts_are_bitwise_equal(dtype: torch.dtype, isa: str) -> None:
    case = Case("repeats", 190, 40, 6 * 100, 12, dtype=dtype)
    arguments = (*case.inputs(), case.K, *oracles.routes(unequal(case.B, 6), 6))
    first = select_topk_routed(*arguments, backend="cpu")
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        assert_equal(select_topk_routed(*arguments, backend="cpu"), first)


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        ([0, 1, 1], [0, 2, 3], "tokens: expected each of the 3 tokens once, .* 2 different"),
        ([0, 1, 3], [0, 2, 3], "tokens: expected each of the 3 tokens once"),
        ([0, -1, 2], [0, 2, 3], "tokens: expected each of the 3 tokens once"),
        ([2, 1, 0], [0, 2, 2], "starts that end with 3; .* an end of 2"),
        ([0, 1, 2], [0, 2, 4], "starts: expected ascending numbers from 0 .* got 0 to 4"),
        ([0, 1, 2], [1, 2, 3], "starts: expected ascending numbers from 0 .* got 1 to 3"),
        ([0, 1, 2], [0, 4, 3], "starts: .* falling at token 1"),
    ],
)
def test_routes_that_are_none(
    tokens: list[int], starts: list[int], message: str, either_backend: str
) -> None:
    x, W, b = Case("wrong", 3, 4, 8, 2).inputs()
    lists = (torch.tensor(tokens).int(), torch.tensor(starts).int())
    with pytest.raises(ValueError, match=message):
        select_topk_routed(x, W, b, 2, *lists, backend=either_backend)


@hypothesis.given(drawn=problems())
def test_drawn_problems(drawn: Drawn, enter: Any) -> None:
    # Each of a few experts has as many latents as were drawn.
    enter(drawn)
    n_experts = 1 + drawn.seed % 5
    x, W = drawn.integers(drawn.B, drawn.D), drawn.integers(n_experts * drawn.F, drawn.D)
    b = drawn.integers(n_experts * drawn.F)
    experts = torch.randint(n_experts, (drawn.B,))
    lists = oracles.routes(experts, n_experts)
    operands = (drawn.place("x", x.to(drawn.dtype)), drawn.place("W", W.to(drawn.dtype)), b)
    values, indices = select_topk_routed(*operands, drawn.k, *lists, backend="cpu")
    exact = oracles.of_experts(oracles.scores(x, W, b), experts, n_experts)
    own = oracles.selection(exact.key, drawn.k)
    assert_bitwise("indices", indices.long(), own + experts[:, None] * drawn.F)
    assert_within("values", values, exact.h.gather(1, own), 0.0)
