"""decode, decode_residual and code_grad on every backend against the fp64 oracle."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.testing import assert_bitwise, assert_within, gamma, oracles, rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# B, K, D, F: odd widths, widths around the vector lengths, more entries than one batch of rows.
SHAPES = (
    (9, 5, 37, 40),
    (1, 1, 1, 1),
    (0, 3, 8, 10),
    (17, 8, 64, 100),
    (3, 70, 129, 200),
    (5, 200, 16, 200),
    (4, 6, 2304, 13),
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


class Codes(NamedTuple):
    """Arguments of decode, with a few dropped entries (value 0)."""

    values: torch.Tensor
    indices: torch.Tensor
    W: torch.Tensor
    b_dec: torch.Tensor


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Codes:
    """Random codes with distinct latents, in the accumulator dtype of ``dtype``."""
    B, K, D, F = shape
    high = accumulator(dtype)
    values = torch.randn(B, K, dtype=high) * (torch.rand(B, K) > 0.1)
    indices = torch.rand(B, F).argsort(dim=1)[:, :K].to(torch.int32)
    return Codes(values, indices, torch.randn(F, D).to(dtype), torch.randn(D, dtype=high))


@shapes
@dtypes
@pytest.mark.parametrize("groups", [None, 1, 3], ids=lambda g: f"groups-{g}")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_decode(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    groups: int | None,
    bias: bool,
    backend: str,
) -> None:
    codes = make(shape, dtype)
    b_dec = codes.b_dec if bias else None
    ends = group_ends(groups, shape[3])
    out = decode(*codes[:3], b_dec, ends, backend=backend)
    expected, magnitude = oracles.decode(*codes[:3], b_dec, ends)
    # K products and the bias; a prefix may be continued from the one before, group by group.
    assert_within("x_hat", out, expected, rounding(shape[1] + 1, magnitude, dtype))


@shapes
@dtypes
@pytest.mark.parametrize("groups", [None, 1, 3], ids=lambda g: f"groups-{g}")
def test_code_grad(
    shape: tuple[int, int, int, int], dtype: torch.dtype, groups: int | None, backend: str
) -> None:
    _, indices, W, _ = make(shape, dtype)
    ends = group_ends(groups, shape[3])
    leading = () if groups is None else (groups,)
    grad = torch.randn(*leading, shape[0], shape[2], dtype=accumulator(dtype))
    out = code_grad(grad, indices, W, ends, backend=backend)
    expected, magnitude = oracles.code_grad(grad, indices, W, ends)
    assert_within("dvalues", out, expected, rounding(shape[2], magnitude, dtype))


@shapes
@dtypes
@pytest.mark.parametrize("drop_zeros", [True, False], ids=["drop-zeros", "keep-zeros"])
def test_decode_residual(
    shape: tuple[int, int, int, int], dtype: torch.dtype, drop_zeros: bool, backend: str
) -> None:
    _, K, D, _ = shape
    codes = make(shape, dtype)
    target = torch.randn(shape[0], D, dtype=codes.values.dtype)
    e, sse, grad = decode_residual(*codes, target, drop_zeros, backend=backend)
    x_hat, magnitude = oracles.decode(*codes)
    exact = x_hat - target.double()
    de = rounding(K + 2, magnitude + target.double().abs(), dtype)
    assert_within("residual", e, exact, de)
    # The sums below start from a residual that is off by de.
    own = rounding(D + 1, exact.square().sum(1), dtype)
    assert_within("sse", sse, exact.square().sum(1), ((2 * exact.abs() + de) * de).sum(1) + own)
    expected, terms = oracles.code_grad(exact, codes.indices, codes.W)
    carried = oracles.code_grad(de, codes.indices, codes.W.abs())[0]
    if drop_zeros:
        expected = torch.where(codes.values == 0, 0.0, expected)
        assert not bool(grad[codes.values == 0].any()), "a dropped entry has a gradient"
    budget = carried * (1 + gamma(D, dtype)) + rounding(D, terms, dtype)
    assert_within("code_grad", grad, expected, budget)


def group_ends(groups: int | None, n_latents: int) -> torch.Tensor | None:
    """Ends of that many groups, the first possibly empty."""
    if groups is None:
        return None
    ends = [n_latents * g // groups for g in range(1, groups + 1)]
    return torch.tensor(ends, dtype=torch.int32)


def test_integer_codes_decode_exactly(backend: str) -> None:
    codes = make((30, 20, 45, 60), torch.float32)
    values, W = (codes.values * 4).round(), (codes.W * 4).round()
    out = decode(values, codes.indices, W, None, None, backend=backend)
    assert_within("x_hat", out, oracles.decode(values, codes.indices, W)[0], 0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_dropped_entry_adds_nothing_whatever_its_row_holds(bad: float, backend: str) -> None:
    W = torch.tensor([[1.0, 2.0], [bad, bad]])
    values, indices = torch.tensor([[3.0, 0.0], [3.0, -0.0]]), torch.tensor([[0, 1]] * 2).int()
    out = decode(values, indices, W, None, None, backend=backend)
    assert out.tolist() == [[3.0, 6.0], [3.0, 6.0]]


def test_nan_and_infinity_reach_the_reconstruction_and_the_loss(backend: str) -> None:
    values = torch.tensor([[torch.nan], [torch.inf], [1.0]])
    indices, W = torch.zeros(3, 1, dtype=torch.int32), torch.tensor([[1.0, -1.0]])
    e, sse, grad = decode_residual(
        values, indices, W, None, torch.zeros(3, 2), True, backend=backend
    )
    expected = torch.tensor([[torch.nan] * 2, [torch.inf, -torch.inf], [1.0, -1.0]])
    assert_within("residual", e, expected, 0.0)
    assert_within("sse", sse, torch.tensor([torch.nan, torch.inf, 2.0]), 0.0)
    assert_within("code_grad", grad, torch.tensor([[torch.nan], [torch.inf], [2.0]]), 0.0)


def test_decode_is_linear_in_the_values(backend: str) -> None:
    values, indices, W, _ = make((12, 9, 50, 64), torch.float64)
    other = torch.randn_like(values)
    both, first, second = (
        decode(v, indices, W, None, None, backend=backend) for v in (values + other, values, other)
    )
    magnitude = oracles.decode(values.abs() + other.abs(), indices, W)[1]
    budget = 2 * rounding(indices.shape[1] + 1, magnitude, torch.float64)
    assert_within("sum", first + second, both, budget)


def test_duplicate_latents_of_a_token_add_up(backend: str) -> None:
    indices = torch.tensor([[2, 2, 1]], dtype=torch.int32)
    W = torch.tensor([[9.0], [10.0], [1.0]])
    out = decode(torch.tensor([[1.0, 2.0, 3.0]]), indices, W, None, None, backend=backend)
    assert out.tolist() == [[33.0]]


@dtypes
def test_repeats_threads_and_batches_are_bitwise_equal(dtype: torch.dtype, isa: str) -> None:
    codes = make((61, 40, 70, 90), dtype)
    target = torch.randn(61, 70, dtype=codes.values.dtype)
    first = decode_residual(*codes, target, True, backend="cpu")
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        part = slice(repeat, 61 - repeat)
        again = decode_residual(
            codes.values[part],
            codes.indices[part],
            codes.W,
            codes.b_dec,
            target[part],
            True,
            backend="cpu",
        )
        for name, a, b in zip(("residual", "sse", "code_grad"), again, first, strict=True):
            assert_bitwise(f"{name}, repeat {repeat}", a, b[part])


@dtypes
def test_the_fused_form_agrees_with_the_plain_ones(dtype: torch.dtype, isa: str) -> None:
    codes = make((11, 9, 53, 40), dtype)
    target = torch.randn(11, 53, dtype=codes.values.dtype)
    e, _, grad = decode_residual(*codes, target, False, backend="cpu")
    assert_bitwise("residual", e, decode(*codes, None, backend="cpu") - target)
    assert_bitwise("code_grad", grad, code_grad(e, *codes[1:3], None, backend="cpu"))


@pytest.mark.parametrize("wrong", [-1, 10, 2**31 - 1, -(2**31)])
def test_an_index_out_of_range_is_an_error(wrong: int, backend: str) -> None:
    values, indices, W, _ = make((40, 3, 8, 10), torch.float32)
    indices[33, 1] = wrong
    message = rf"codes: expected latent indices in \[0, 10\), got {wrong}"
    with pytest.raises(IndexError, match=message):
        decode(values, indices, W, None, None, backend=backend)
    with pytest.raises(IndexError, match=message):
        code_grad(torch.zeros(40, 8), indices, W, None, backend=backend)
    with pytest.raises(IndexError, match=message):
        decode_residual(values, indices, W, None, torch.zeros(40, 8), True, backend=backend)


@pytest.mark.parametrize(
    "ends", [[], [4, 8], [10, 4], [-1, 10], [4, 11]], ids=lambda ends: f"ends-{ends}"
)
def test_group_ends_that_do_not_split_the_latents_are_refused(
    ends: list[int], backend: str
) -> None:
    values, indices, W, _ = make((4, 3, 8, 10), torch.float32)
    group_ends = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"group_ends: expected .* got"):
        decode(values, indices, W, None, group_ends, backend=backend)
    with pytest.raises(ValueError, match=r"group_ends: expected .* got"):
        code_grad(torch.zeros(len(ends), 4, 8), indices, W, group_ends, backend=backend)
