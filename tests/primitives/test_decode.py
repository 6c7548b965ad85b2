"""decode, decode_residual and code_grad on every backend against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from decoding import CHECKED_ON_THE_HOST, assert_residual, group_ends, make, needs
from encoding import dtypes

from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.testing import assert_bitwise, assert_within, oracles, rounding

PRIMITIVES = ("decode", "decode_residual", "code_grad")
# B, K, D, F: odd widths, widths around the vector lengths and of several blocks of columns; more
# entries than one batch of rows and, the last, than decode_residual holds at once on a GPU.
SHAPES = (
    (9, 5, 37, 40),
    (1, 1, 1, 1),
    (0, 3, 8, 10),
    (17, 8, 64, 100),
    (3, 70, 129, 200),
    (5, 200, 16, 200),
    (4, 6, 2304, 13),
    (2, 33, 768, 40),
    (4, 1, 129, 5),
    (1, 260, 37, 270),
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


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
    needs(dtype, backend)
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
    needs(dtype, backend)
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
    needs(dtype, backend)
    codes = make(shape, dtype)
    target = torch.randn(shape[0], shape[2], dtype=codes.values.dtype)
    results = decode_residual(*codes, target, drop_zeros, backend=backend)
    assert_residual(results, codes, target, drop_zeros)


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
    values, indices, W, _ = make((12, 9, 50, 64), torch.float32)
    other = torch.randn_like(values)
    both, first, second = (
        decode(v, indices, W, None, None, backend=backend) for v in (values + other, values, other)
    )
    magnitude = oracles.decode(values.abs() + other.abs(), indices, W)[1]
    budget = 2 * rounding(indices.shape[1] + 1, magnitude, torch.float32)
    assert_within("sum", first + second, both, budget)


def test_duplicate_latents_of_a_token_add_up(backend: str) -> None:
    indices = torch.tensor([[2, 2, 1]], dtype=torch.int32)
    W = torch.tensor([[9.0], [10.0], [1.0]])
    out = decode(torch.tensor([[1.0, 2.0, 3.0]]), indices, W, None, None, backend=backend)
    assert out.tolist() == [[33.0]]


def test_every_one_of_many_duplicates_counts_and_has_the_gradient(backend: str) -> None:
    values, indices = torch.arange(1.0, 21.0)[None], torch.full((1, 20), 3, dtype=torch.int32)
    W = torch.randint(-4, 5, (5, 70)).float()
    e, sse, grad = decode_residual(
        values, indices, W, None, torch.ones(1, 70), True, backend=backend
    )
    expected = 210 * W[3] - 1
    assert e.tolist() == [expected.tolist()]
    assert sse.tolist() == [float(expected.square().sum())]
    assert grad.tolist() == [[float(expected @ W[3])] * 20]


def test_an_empty_first_group_is_the_bias(backend: str) -> None:
    values, indices, W, b_dec = make((3, 20, 37, 40), torch.float32)
    values, W, b_dec = ((t * 4).round() for t in (values, W, b_dec))  # every sum is exact
    ends = torch.tensor([0, 0, 11, 11, 40], dtype=torch.int32)
    out = decode(values, indices, W, b_dec, ends, backend=backend)
    assert_within("x_hat", out, oracles.decode(values, indices, W, b_dec, ends)[0], 0.0)
    assert_within("the empty group", out[0], b_dec.expand(3, 37), 0.0)
    grad = torch.arange(5.0)[:, None, None].expand(5, 3, 37)
    dvalues = code_grad(grad, indices, W, ends, backend=backend)
    group = torch.where(indices < 11, 2.0, 4.0)
    assert_within("dvalues", dvalues, group * W.sum(1)[indices.long()], 0.0)


def test_tensors_may_be_views_with_gaps_and_odd_addresses(backend: str) -> None:
    B, K, D, F = 5, 20, 48, 60
    values, indices, W, b_dec = make((B, K, D, F), torch.float32)
    values, W, b_dec = ((t * 4).round() for t in (values, W, b_dec))  # every sum is exact
    target = torch.randint(-9, 10, (B, D)).float()

    def gaps(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(2, dim=-1)[..., 1::2]

    def odd(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    plain = (values, indices, W, b_dec, target)
    expected = decode_residual(*plain, True, backend=backend)
    x_hat = oracles.decode(values, indices, W, b_dec)[0]
    assert_within("residual", expected[0], x_hat - target, 0.0)
    for view in (gaps, odd):
        v, i, w, b, t = map(view, plain)
        assert_within("x_hat", decode(v, i, w, b, None, backend=backend), x_hat, 0.0)
        grad = code_grad(view(expected[0]), i, w, None, backend=backend)
        again = decode_residual(v, i, w, b, t, False, backend=backend)
        assert_within("code_grad", grad, again[2], 0.0)
        for name, a, e in zip(
            ("residual", "sse", "code_grad"),
            decode_residual(v, i, w, b, t, True, backend=backend),
            expected,
            strict=True,
        ):
            assert_within(name, a, e, 0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_residual_keeps_to_the_rows_of_live_entries(bad: float, backend: str) -> None:
    # Without ReLU an entry of value 0 has a gradient, which its row reaches; no other result does.
    W = torch.tensor([[1.0, 2.0], [bad, bad]])
    values, indices = torch.tensor([[3.0, 0.0]]), torch.tensor([[0, 1]], dtype=torch.int32)
    for drop_zeros, last in ((True, 0.0), (False, bad)):
        e, sse, grad = decode_residual(
            values, indices, W, None, torch.zeros(1, 2), drop_zeros, backend=backend
        )
        assert e.tolist() == [[3.0, 6.0]]
        assert sse.tolist() == [45.0]
        assert_within("code_grad", grad, torch.tensor([[15.0, last]]), 0.0)


def test_a_token_does_not_depend_on_its_batch(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the specification sums as torch does, whose order follows the batch's shape")
    codes = make((7, 40, 70, 90), torch.float32)
    target = torch.randn(7, 70)
    whole = decode_residual(*codes, target, True, backend=backend)
    x_hat = decode(*codes, None, backend=backend)
    part = slice(2, 5)
    few = codes._replace(values=codes.values[part], indices=codes.indices[part])
    for repeat in range(2):
        again = decode_residual(*few, target[part], True, backend=backend)
        for name, a, b in zip(("residual", "sse", "code_grad"), again, whole, strict=True):
            assert_bitwise(f"{name}, repeat {repeat}", a, b[part])
        assert_bitwise("x_hat", decode(*few, None, backend=backend), x_hat[part])


@pytest.mark.parametrize("drop_zeros", [True, False], ids=["drop-zeros", "keep-zeros"])
def test_too_many_entries_to_fuse_are_decoded_first(
    drop_zeros: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "triton":
        pytest.skip(f"{backend} has one form for any number of entries")
    from sae_kernels.primitives.decode_residual import triton

    codes = make((3, 40, 300, 60), torch.bfloat16)
    target = torch.randn(3, 300)
    fused = decode_residual(*codes, target, drop_zeros, backend=backend)
    monkeypatch.setattr(triton, "MOST_FUSED", 39)
    composed = decode_residual(*codes, target, drop_zeros, backend=backend)
    assert not torch.equal(fused[1], composed[1]), "both took the same form"
    assert_bitwise("residual", composed[0], decode(*codes, None, backend=backend) - target)
    for results in (fused, composed):
        assert_residual(results, codes, target, drop_zeros)


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


WRONG = [-1, 10, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_index_out_of_range_is_an_error(wrong: int, backend: str) -> None:
    if backend not in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} makes NaN of it, see the next test")
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
    ("wrong", "K", "F"), [*((wrong, 3, 10) for wrong in WRONG), (270, 260, 270)]
)
def test_an_index_out_of_range_is_nan_in_its_token_alone(
    wrong: int, K: int, F: int, backend: str
) -> None:
    if backend in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} raises, see the test before")
    values, indices, W, b_dec = make((3, K, 8, F), torch.float32)
    values[1, :2] = torch.tensor([2.0, 0.0])  # the second is a dropped entry
    ends, target = group_ends(3, F), torch.randn(3, 8)
    bad = indices.clone()
    bad[1, :2] = wrong
    token = torch.tensor([[False], [True], [False]])
    entry, live = bad != indices, values != 0
    affected = (token, token, entry, entry, token, token[:, 0], token & live)

    def everything(indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            decode(values, indices, W, b_dec, None, backend=backend),
            decode(values, indices, W, b_dec, ends, backend=backend),
            code_grad(target, indices, W, None, backend=backend),
            code_grad(target.expand(3, 3, 8), indices, W, ends, backend=backend),
            *decode_residual(values, indices, W, b_dec, target, True, backend=backend),
        )

    names = ("x_hat", "prefixes", "dvalues", "dvalues of groups", "residual", "sse", "code_grad")
    for name, came, good, hit in zip(
        names, everything(bad), everything(indices), affected, strict=True
    ):
        hit = hit.expand(came.shape)
        assert bool(came[hit].isnan().all()), f"{name}: a wrong index is hidden"
        assert_bitwise(f"{name} elsewhere", came[~hit], good[~hit])


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_wrong_index_of_value_zero_shows_in_its_own_gradient_alone(
    wrong: int, backend: str
) -> None:
    if backend in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} raises for every wrong index")
    values, indices, W, _ = make((2, 4, 8, 10), torch.float32)
    values[0, 2] = 0
    bad = indices.clone()
    bad[0, 2] = wrong
    for drop_zeros in (True, False):
        good, came = (
            decode_residual(values, i, W, None, torch.ones(2, 8), drop_zeros, backend=backend)
            for i in (indices, bad)
        )
        if not drop_zeros:
            good[2][0, 2] = torch.nan
        for name, a, b in zip(("residual", "sse", "code_grad"), came, good, strict=True):
            assert_within(name, a, b, 0.0)


@pytest.mark.parametrize(
    "ends", [[], [4, 8], [10, 4], [-1, 10], [4, 11]], ids=lambda ends: f"ends-{ends}"
)
def test_group_ends_that_do_not_split_the_latents_are_refused(
    ends: list[int], backend: str
) -> None:
    if backend not in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} makes NaN of latents without a group, see the next test")
    values, indices, W, _ = make((4, 3, 8, 10), torch.float32)
    group_ends = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"group_ends: expected .* got"):
        decode(values, indices, W, None, group_ends, backend=backend)
    with pytest.raises(ValueError, match=r"group_ends: expected .* got"):
        code_grad(torch.zeros(len(ends), 4, 8), indices, W, group_ends, backend=backend)


@pytest.mark.parametrize("ends", [[], [4, 8], [10, 4]], ids=lambda ends: f"ends-{ends}")
def test_a_latent_above_the_last_group_is_nan(ends: list[int], backend: str) -> None:
    if backend in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} raises, see the test before")
    indices = torch.tensor([[3], [9]], dtype=torch.int32)
    W, group_ends = torch.ones(10, 8), torch.tensor(ends, dtype=torch.int32)
    out = decode(torch.ones(2, 1), indices, W, None, group_ends, backend=backend)
    grad = torch.ones(len(ends), 2, 8)
    dvalues = code_grad(grad, indices, W, group_ends, backend=backend)
    expected = torch.tensor([8.0 if ends else torch.nan, torch.nan])
    assert_within("dvalues", dvalues[:, 0], expected, 0.0)
    x_hat = torch.tensor([1.0, torch.nan])[:, None].expand(len(ends), 2, 8)
    assert_within("x_hat", out, x_hat, 0.0)
