"""Ragged codes and weighted groups through decode, decode_residual and code_grad."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from decoding import (
    CHECKED_ON_THE_HOST,
    Codes,
    Form,
    assert_residual,
    group_ends,
    make,
    make_ragged,
    most_entries,
    needs,
)
from encoding import dtypes

from sae_kernels.primitives import checks
from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.terms import tree_sum, values_by_block
from sae_kernels.testing import assert_bitwise, assert_within, oracles, rounding

if TYPE_CHECKING:
    from collections.abc import Callable

PRIMITIVES = ("decode", "decode_residual", "code_grad")
RESULTS = ("residual", "sse", "code_grad")
# Entries by token, D, F: tokens without any, with one, with all latents, with more than one batch
# of rows; no token at all.
RAGGED = {
    "mixed": ([5, 0, 3, 0, 0, 7, 1], 37, 40),
    "no-token": ([], 8, 10),
    "no-entry": ([0, 0, 0], 8, 10),
    "all-latents": ([200], 16, 200),
    "long-and-short": ([0, 200, 1, 70, 64, 65, 0], 129, 200),
    "many-tokens": ([t * 7 % 11 for t in range(60)], 64, 30),
    "wide": ([13, 2, 0, 6], 2304, 13),
    "one-of-each": ([1], 1, 1),
}
ragged = pytest.mark.parametrize("name", RAGGED)
some_groups = pytest.mark.parametrize("groups", [None, 1, 3], ids=lambda g: f"groups-{g}")


def ends_of(groups: int | None, n_latents: int) -> torch.Tensor | None:
    """Ends of so many groups, the first of three empty."""
    ends = group_ends(groups, n_latents)
    if ends is not None and groups == 3:
        ends[0] = 0
    return ends


def residual(
    codes: Codes, target: torch.Tensor, drop_zeros: bool, form: Form, backend: str
) -> tuple[torch.Tensor, ...]:
    """Runs decode_residual, or skips with what the backend says against such a call."""
    arguments = (*codes, target, drop_zeros, *form)
    needs(codes.W.dtype, backend, "decode_residual", arguments)
    results: tuple[torch.Tensor, ...] = decode_residual(*arguments, backend=backend)
    return results


@ragged
@dtypes
@some_groups
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_decode_of_ragged_codes(
    name: str, dtype: torch.dtype, groups: int | None, bias: bool, backend: str
) -> None:
    codes, offsets = make_ragged(*RAGGED[name], dtype)
    ends = ends_of(groups, codes.W.shape[0])
    arguments = (*codes[:3], codes.b_dec if bias else None, ends, offsets)
    needs(dtype, backend, "decode", arguments)
    out = decode(*arguments, backend=backend)
    expected, magnitude = oracles.decode(*arguments)
    budget = rounding(most_entries(codes, offsets) + 1, magnitude, dtype)
    assert_within("x_hat", out, expected, budget)


@ragged
@dtypes
@some_groups
def test_code_grad_of_ragged_codes(
    name: str, dtype: torch.dtype, groups: int | None, backend: str
) -> None:
    codes, offsets = make_ragged(*RAGGED[name], dtype)
    ends = ends_of(groups, codes.W.shape[0])
    leading = () if groups is None else (groups,)
    D = codes.W.shape[1]
    grad = torch.randn(*leading, offsets.numel() - 1, D, dtype=accumulator(dtype))
    arguments = (grad, codes.indices, codes.W, ends, offsets)
    needs(dtype, backend, "code_grad", arguments)
    out = code_grad(*arguments, backend=backend)
    expected, magnitude = oracles.code_grad(*arguments)
    assert_within("dvalues", out, expected, rounding(D, magnitude, dtype))


@ragged
@dtypes
@some_groups
@pytest.mark.parametrize("drop_zeros", [True, False], ids=["drop-zeros", "keep-zeros"])
def test_decode_residual_of_ragged_codes(
    name: str, dtype: torch.dtype, groups: int | None, drop_zeros: bool, backend: str
) -> None:
    codes, offsets = make_ragged(*RAGGED[name], dtype)
    high = codes.values.dtype
    target = torch.randn(offsets.numel() - 1, codes.W.shape[1], dtype=high)
    weights = None if groups is None else torch.randn(groups, dtype=high)
    form = Form(ends_of(groups, codes.W.shape[0]), weights, offsets)
    results = residual(codes, target, drop_zeros, form, backend)
    assert_residual(results, codes, target, drop_zeros, form)


@dtypes
@pytest.mark.parametrize("groups", [1, 3, 7])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no-weights"])
def test_decode_residual_in_groups(
    groups: int, weighted: bool, dtype: torch.dtype, backend: str
) -> None:
    codes = make((9, 20, 37, 40), dtype)
    target = torch.randn(9, 37, dtype=codes.values.dtype)
    weights = torch.randn(groups, dtype=codes.values.dtype) if weighted else None
    form = Form(ends_of(groups, 40), weights)
    for drop_zeros in (True, False):
        results = residual(codes, target, drop_zeros, form, backend)
        assert [list(t.shape) for t in results] == [[groups, 9, 37], [groups, 9], [9, 20]]
        assert_residual(results, codes, target, drop_zeros, form)


def test_residuals_are_sums_over_the_later_prefixes(backend: str) -> None:
    # One token of latents 0, 1 and 2 with rows 1, 10 and 100: prefixes 0, 1, 11 and 111.
    W = torch.tensor([1.0, 10.0, 100.0])[:, None]
    codes = Codes(torch.ones(1, 3), torch.tensor([[2, 0, 1]]).int(), W, torch.zeros(1))
    ends = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    for weights, e in (
        (None, [123.0, 123.0, 122.0, 111.0]),
        (torch.tensor([5.0, 2.0, -1.0, 0.5]), [46.5, 46.5, 44.5, 55.5]),
    ):
        form = Form(ends, weights)
        came, sse, grad = residual(codes, torch.zeros(1, 1), True, form, backend)
        assert came.flatten().tolist() == e
        assert sse.flatten().tolist() == [0.0, 1.0, 121.0, 111.0**2]  # without the weights
        assert grad.tolist() == [[100 * e[3], e[1], 10 * e[2]]]


def test_an_empty_group_is_the_bias_alone(backend: str) -> None:
    codes, offsets = make_ragged([0, 30, 4], 24, 30, torch.float32)
    codes = Codes(*(t if t.dtype == torch.int32 else (t * 4).round() for t in codes))
    target = torch.randint(-9, 10, (3, 24)).float()
    ends = torch.tensor([0, 0, 11, 11, 30], dtype=torch.int32)
    form = Form(ends, torch.tensor([1.0, 2.0, 0.0, -1.0, 4.0]), offsets)
    arguments = (*codes, ends, offsets)
    needs(torch.float32, backend, "decode", arguments)
    x_hat = decode(*arguments, backend=backend)
    assert_within("x_hat", x_hat, oracles.decode(*arguments)[0], 0.0)
    for group in (0, 1):
        assert_within("an empty group", x_hat[group], codes.b_dec.expand(3, 24), 0.0)
    assert_within("the same prefix", x_hat[3], x_hat[2], 0.0)
    e, sse, _ = residual(codes, target, True, form, backend)
    exact = oracles.suffix_sums(x_hat - target, form.group_weights)
    assert_within("residual", e, exact, 0.0)
    assert_within("sse", sse, (x_hat - target).square().sum(-1), 0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_dropped_entry_of_ragged_codes_adds_nothing(bad: float, backend: str) -> None:
    W = torch.tensor([[1.0, 2.0], [bad, bad]])
    values, indices = torch.tensor([3.0, 0.0, -0.0]), torch.tensor([0, 1, 1]).int()
    form = Form(offsets=torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    codes = Codes(values, indices, W, torch.zeros(2))
    e, sse, grad = residual(codes, torch.zeros(3, 2), True, form, backend)
    assert e.tolist() == [[3.0, 6.0], [0.0, 0.0], [0.0, 0.0]]
    assert sse.tolist() == [45.0, 0.0, 0.0]
    assert grad.tolist() == [15.0, 0.0, 0.0]


def test_nan_of_one_token_stays_in_it(backend: str) -> None:
    codes, offsets = make_ragged([2, 3, 0, 2], 20, 15, torch.float32)
    form, target = Form(ends_of(3, 15), torch.ones(3), offsets), torch.randn(4, 20)
    good = residual(codes, target, True, form, backend)
    values = codes.values.clone()
    values[3] = torch.nan
    e, sse, grad = residual(codes._replace(values=values), target, True, form, backend)
    assert e.isnan().any(0).any(1).tolist() == [False, True, False, False]
    assert sse.isnan().any(0).tolist() == [False, True, False, False]
    others = torch.tensor([True, False, True, True])
    assert_bitwise("residual", e[:, others], good[0][:, others])
    assert_bitwise("code_grad", grad[[0, 1, 5, 6]], good[2][[0, 1, 5, 6]])


@dtypes
def test_repeats_threads_and_batches_are_bitwise_equal(dtype: torch.dtype, isa: str) -> None:
    counts = [t * 13 % 41 for t in range(61)]
    codes, offsets = make_ragged(counts, 70, 90, dtype)
    high = codes.values.dtype
    target, groups = torch.randn(61, 70, dtype=high), (ends_of(3, 90), torch.rand(3, dtype=high))
    first = decode_residual(*codes, target, True, *groups, offsets, backend="cpu")
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        part = slice(repeat, 61 - repeat)
        ends = offsets[repeat : 61 - repeat + 1]
        entries = slice(int(ends[0]), int(ends[-1]))
        few = codes._replace(values=codes.values[entries], indices=codes.indices[entries])
        again = decode_residual(*few, target[part], True, *groups, (ends - ends[0]), backend="cpu")
        wanted = (first[0][:, part], first[1][:, part], first[2][entries])
        for name, a, b in zip(RESULTS, again, wanted, strict=True):
            assert_bitwise(f"{name}, repeat {repeat}", a, b)


@dtypes
def test_ragged_codes_of_equal_lengths_are_the_others(dtype: torch.dtype, isa: str) -> None:
    codes = make((11, 9, 53, 40), dtype)
    target = torch.randn(11, 53, dtype=codes.values.dtype)
    offsets = torch.arange(0, 100, 9, dtype=torch.int32)
    flat = codes._replace(values=codes.values.flatten(), indices=codes.indices.flatten())
    ends, weights = ends_of(3, 40), torch.randn(3, dtype=codes.values.dtype)
    for groups in ((None, None), (ends, None), (ends, weights)):
        came = decode_residual(*flat, target, True, *groups, offsets, backend="cpu")
        expected = decode_residual(*codes, target, True, *groups, None, backend="cpu")
        for name, a, b in zip(RESULTS, came, expected, strict=True):
            assert_bitwise(name, a, b.reshape(a.shape))


@dtypes
def test_the_fused_form_agrees_with_the_plain_ones(dtype: torch.dtype, isa: str) -> None:
    codes, offsets = make_ragged([9, 0, 40, 3], 53, 40, dtype)
    target = torch.randn(4, 53, dtype=codes.values.dtype)
    for ends in (None, ends_of(3, 40)):
        e, _, grad = decode_residual(*codes, target, False, ends, None, offsets, backend="cpu")
        x_hat = decode(*codes, ends, offsets, backend="cpu")
        difference = x_hat - target
        if ends is not None:  # added up from the last on, as the kernel does
            difference[1] += difference[2]
            difference[0] += difference[1]
        assert_bitwise("residual", e, difference)
        again = code_grad(e, *codes[1:3], ends, offsets, backend="cpu")
        assert_bitwise("code_grad", grad, again)


def calls(
    codes: Codes, form: Form, backend: str
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """A call of each primitive with the same codes."""
    ends, _, offsets = form
    x = torch.zeros(checks.n_tokens(codes.indices, offsets), codes.W.shape[1])
    grad = x if ends is None else x.expand(ends.numel(), *x.shape)
    return (
        lambda: decode(*codes, ends, offsets, backend=backend),
        lambda: code_grad(grad, *codes[1:3], ends, offsets, backend=backend),
        lambda: decode_residual(*codes, x, True, *form, backend=backend),
    )


@pytest.mark.parametrize("wrong", [-1, 10, 2**31 - 1, -(2**31)])
def test_an_index_of_ragged_codes_out_of_range_is_an_error(wrong: int, backend: str) -> None:
    if backend not in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} makes NaN of it")
    codes, offsets = make_ragged([3, 0, 2, 4], 8, 10, torch.float32)
    codes.indices[4] = wrong
    for call in calls(codes, Form(offsets=offsets), backend):
        with pytest.raises(IndexError, match=rf"codes: expected .*\[0, 10\), got {wrong}"):
            call()


@pytest.mark.parametrize(
    ("offsets", "what"),
    [
        ([0, 3, 2, 5], "0 to 5, falling at token 1"),
        ([0, 3, 5, 6], "0 to 6"),
        ([1, 3, 4, 5], "1 to 5"),
        ([-1, 3, 4, 5], "-1 to 5"),
        ([0, 2**31 - 1, 4, 5], "0 to 5, falling at token 1"),
    ],
    ids=str,
)
def test_offsets_that_do_not_split_the_entries_are_refused(
    offsets: list[int], what: str, backend: str
) -> None:
    if backend not in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} cannot look at them without waiting for the device")
    codes, _ = make_ragged([3, 0, 2], 8, 10, torch.float32)
    form = Form(offsets=torch.tensor(offsets, dtype=torch.int32))
    for call in calls(codes, form, backend):
        with pytest.raises(ValueError, match=rf"offsets: expected .*the 5 entries, got {what}$"):
            call()


@pytest.mark.parametrize(
    "ends", [[], [4, 8], [10, 4], [-1, 10], [4, 11]], ids=lambda ends: f"ends-{ends}"
)
def test_group_ends_that_do_not_split_the_latents_are_refused_of_ragged_codes(
    ends: list[int], backend: str
) -> None:
    if backend not in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} makes NaN of latents without a group")
    codes, offsets = make_ragged([3, 0, 2, 4], 8, 10, torch.float32)
    form = Form(torch.tensor(ends, dtype=torch.int32), None, offsets)
    for call in calls(codes, form, backend):
        with pytest.raises(ValueError, match=r"group_ends: expected .* got"):
            call()


@dtypes
@some_groups
@pytest.mark.parametrize("blocks", [2, 5, 8])
@pytest.mark.parametrize("name", ["mixed", "long-and-short", None])
def test_blocks_of_latents_are_added_as_a_tree(
    name: str | None, blocks: int, dtype: torch.dtype, groups: int | None, backend: str
) -> None:
    """Bit for bit the sums of each block's own entries: another process may have made some."""
    if name is None:
        codes, offsets = make((9, 12, 33, 40), dtype), None
    else:
        codes, offsets = make_ragged(*RAGGED[name], dtype)
    ends = ends_of(groups, codes.W.shape[0])
    arguments = (*codes, ends, offsets)
    needs(dtype, backend, "decode", arguments)
    out = decode(*arguments, blocks, backend=backend)
    each = values_by_block(codes.values, codes.indices, codes.W.shape[0], blocks)
    sums = [
        decode(own, codes.indices, codes.W, None, ends, offsets, backend=backend) for own in each
    ]
    assert_bitwise("decode", out, tree_sum(sums) + codes.b_dec)
    target = torch.randn_like(out if groups is None else out[0])
    form = Form(ends, None, offsets)
    needs(dtype, backend, "decode_residual", (*codes, target, True, *form))
    e, _, grad = decode_residual(*codes, target, True, *form, blocks, backend=backend)
    if groups is None:
        assert_bitwise("residual", e, out - target)
    dots = code_grad(e, codes.indices, codes.W, ends, offsets, backend=backend)
    assert_bitwise("code_grad", grad, torch.where(codes.values == 0, 0, dots))


@pytest.mark.parametrize("blocks", [0, 3, 65])
def test_blocks_divide_the_latents(blocks: int) -> None:
    codes = make((2, 2, 4, 130), torch.float32)
    with pytest.raises(ValueError, match=f"blocks: expected 1 to 64, .* = 130, got {blocks}"):
        decode(*codes, blocks=blocks)
