"""row_update on every backend against the dense fp64 step and against torch's optimizers."""

from __future__ import annotations

import pytest
import torch
from refusals import needs
from rows import (
    CHECKED_ON_THE_HOST,
    COPIES,
    HYPER,
    WIDTH,
    F,
    clone,
    laid_out,
    layouts,
    make_gradient,
    make_row,
    make_term,
    takes,
    upper_halves,
)

from sae_kernels import gpu
from sae_kernels.codes import LatentOrder
from sae_kernels.primitives.row_update import AdamMatrix, row_update
from sae_kernels.primitives.terms import Gradient
from sae_kernels.primitives.transpose_codes import transpose_codes
from sae_kernels.testing import (
    adam_budgets,
    assert_bitwise,
    assert_within,
    gamma,
    norm_budget,
    oracles,
    rounding,
)

PRIMITIVES = ("row_update",)


@pytest.mark.parametrize("high", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("norm", ["none", "unit", "at_most_one"])
@pytest.mark.parametrize("slices", [1, 3], ids=["whole", "slices"])
# In Triton a row, or a slice of one, of more than 512 columns may come in two blocks.
@pytest.mark.parametrize("width", [WIDTH, 129, 600, 3 * 577], ids=lambda width: f"width-{width}")
@pytest.mark.parametrize("parts", [None, 3], ids=["one-norm", "norms"])
def test_a_step_against_the_oracle(
    parts: int | None, width: int, slices: int, norm: str, high: torch.dtype, backend: str
) -> None:
    row = make_row(high, torch.bfloat16 if high == torch.float32 else None, slices, width)
    gradient, grad, magnitude = make_gradient(high, row, parts)
    takes(row, gradient, backend)
    before = oracles.AdamState(*(t.double() for t in row[:3]))
    expected = oracles.row_update(before, grad, HYPER, norm=norm, slices=slices)
    row_update(row, gradient, HYPER, norm=norm, slices=slices, backend=backend)

    # 12 tokens in each of at most 3 terms, a dense row, and a penalty scaled by a norm.
    dg = rounding(3 * 12 + 2, magnitude, high) + gamma(width + 3, high) * magnitude
    if norm == "unit":
        part = [t.unflatten(1, (slices, -1)) for t in (dg, grad.abs(), before.param.abs())]
        along = (part[0] + gamma(width + 2, high) * part[1]) * part[2]
        dg = dg + (along.sum(-1, keepdim=True) * part[2]).flatten(1) + gamma(2, high) * grad.abs()
        grad = oracles.projected(before.param, grad, slices)
    clip = float(HYPER[1])
    dg = clip * dg + gamma(1, high) * clip * grad.abs()
    dp, dm, dv = adam_budgets(before, clip * grad, dg, HYPER, high)
    if norm != "none":
        raw = oracles.row_update(before, grad, HYPER).param
        # Also for rows that "at_most_one" leaves alone: then it only is wider than needed.
        dp = torch.maximum(dp, norm_budget(raw, dp, high, slices))
    assert_within("m", row.m, expected.m, dm)
    assert_within("v", row.v, expected.v, dv)
    assert_within("param", row.param, expected.param, dp)
    if row.copy is not None:
        assert_bitwise("copy", row.copy, row.param.to(row.copy.dtype))


def test_norm_policies_hold_after_the_step(backend: str) -> None:
    row = make_row(torch.float32, None, 3)
    gradient, _, _ = make_gradient(torch.float32, row)
    for norm in ("unit", "at_most_one"):
        after = clone(row)
        after.param.mul_(torch.linspace(0.2, 1.8, F)[:, None])
        row_update(after, gradient, HYPER, norm=norm, slices=3, backend=backend)
        lengths = after.param.double().unflatten(1, (3, -1)).norm(dim=-1)
        off = gamma(WIDTH // 3 + 4, torch.float32)
        assert bool((lengths <= 1 + off).all())
        if norm == "unit":
            assert bool((lengths >= 1 - off).all())
        else:
            assert bool((lengths < 0.9).any()), "shorter rows were to be left alone"


def test_the_projected_step_does_not_see_the_gradient_along_the_row(backend: str) -> None:
    row = make_row(torch.float32, None)
    other = clone(row)
    latents = torch.arange(F, dtype=torch.int32)
    along = Gradient(dense=3.0 * row.param, dense_latents=latents)
    row_update(row, along, HYPER, norm="unit", backend=backend)
    row_update(other, Gradient(), HYPER, norm="unit", backend=backend)
    # <w, w> is 1 up to gamma(WIDTH + 2): that much of the gradient is left over.
    left = 3 * 2 * gamma(WIDTH + 2, torch.float32) + gamma(4, torch.float32) * other.m.abs()
    assert_within("m", row.m, other.m, left)


def test_a_vector_of_width_one_takes_a_source_of_ones(backend: str) -> None:
    row = make_row(torch.float32, None, width=1)
    before = oracles.AdamState(*(t.double() for t in row[:3]))
    term, grad, magnitude = make_term(torch.float32, None, 1)
    row_update(row, Gradient([term]), HYPER, backend=backend)
    expected = oracles.row_update(before, grad, HYPER)
    dg = rounding(14, magnitude, torch.float32)
    budgets = adam_budgets(before, HYPER[1] * grad, dg, HYPER, torch.float32)
    for name, actual, want, budget in zip(
        ("param", "m", "v"), row[:3], expected, budgets, strict=True
    ):
        assert actual is not None
        assert_within(name, actual, want, budget)


def test_a_norm_for_each_part_of_a_row(backend: str) -> None:
    # Parts of lengths 5, 0 and 2; with beta1 = 0 the first moment is the gradient.
    param = torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.0, -2.0], [3.0, 4.0, 0.0, 0.0, 0.0, -2.0]])
    row = AdamMatrix(param, torch.zeros(2, 6), torch.zeros(2, 6))
    gradient = Gradient(row_coef=torch.tensor([[10.0, 7.0, 3.0], [0.0, 7.0, 0.0]]))
    takes(row, gradient, backend)
    hyper = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    row_update(row, gradient, hyper, betas=(0.0, 0.0), backend=backend)
    few = gamma(8, torch.float32) * 10
    assert_within("m", row.m, torch.tensor([[6.0, 8, 0, 0, 0, -3], [0.0] * 6]), few)


def test_one_part_is_the_whole_row(backend: str) -> None:
    row = make_row(torch.float32, None)
    gradient, _, _ = make_gradient(torch.float32, row)
    assert gradient.row_coef is not None
    other, as_matrix = clone(row), gradient._replace(row_coef=gradient.row_coef[:, None])
    row_update(row, gradient, HYPER, backend=backend)
    row_update(other, as_matrix, HYPER, backend=backend)
    for name, a, e in zip(row._fields[:3], other[:3], row[:3], strict=True):
        assert a is not None
        assert e is not None
        assert_bitwise(name, a, e)


def test_lazy_touches_a_row_with_a_penalty_on_any_part(backend: str) -> None:
    row = make_row(torch.float32, None)
    row.param[5, :12] = 0  # a penalty without a gradient is one all the same
    row_coef = torch.zeros(F, 3)
    row_coef[5, 0], row_coef[7, 1], row_coef[9, 2], row_coef[11] = 1.0, 2.0, torch.nan, -0.0
    gradient = Gradient(row_coef=row_coef)
    takes(row, gradient, backend)
    before = clone(row)
    row_update(row, gradient, HYPER, lazy=True, backend=backend)
    moved = (row.param != before.param).any(1).nonzero().flatten()
    assert moved.tolist() == [5, 7, 9]
    assert row.param.isnan().any(1).nonzero().flatten().tolist() == [9]
    assert row.param[9].isnan().tolist() == [False] * 24 + [True] * 12


@layouts
@pytest.mark.parametrize("norm", ["none", "unit"])
def test_lazy_leaves_rows_without_an_entry_bitwise_alone(
    norm: str, layout: str, backend: str
) -> None:
    row = make_row(torch.float32, torch.bfloat16)
    gradient, _, _ = make_gradient(torch.float32, row)
    row = laid_out(row, layout)
    before, dense = clone(row), clone(row)
    row_update(row, gradient, HYPER, norm=norm, lazy=True, backend=backend)
    row_update(dense, gradient, HYPER, norm=norm, backend=backend)
    touched = torch.zeros(F, dtype=torch.bool)
    touched[[20, 3, 0]] = True
    touched[1::2] = True  # by the penalty
    for term in gradient.terms:
        touched |= term.offsets.diff() > 0
    assert 0 < int(touched.sum()) < F
    for name, lazy, old, new in zip(row._fields, row, before, dense, strict=True):
        assert lazy is not None
        assert old is not None
        assert new is not None
        assert_bitwise(f"{name}, untouched", lazy[~touched], old[~touched])
        assert_bitwise(f"{name}, touched", lazy[touched], new[touched])
        assert not torch.equal(old[~touched], new[~touched]), "the dense step moves every row"


@layouts
@pytest.mark.parametrize("flag", [1.0, -1.0, torch.nan], ids=str)
def test_the_skip_flag_leaves_everything_bitwise_alone(
    flag: float, layout: str, backend: str
) -> None:
    row = make_row(torch.float32, torch.float16)
    gradient, _, _ = make_gradient(torch.float32, row)
    row = laid_out(row, layout)
    before, hyper = clone(row), HYPER.clone()
    hyper[1], hyper[4] = torch.nan, flag  # as after a norm that is not finite
    row_update(row, gradient, hyper, norm="unit", backend=backend)
    for name, actual, old in zip(row._fields, row, before, strict=True):
        assert actual is not None
        assert old is not None
        assert_bitwise(name, actual, old)


@pytest.mark.parametrize("copy", COPIES, ids=lambda dtype: str(dtype)[6:])
def test_the_copy_is_the_rounded_parameter(copy: torch.dtype, backend: str) -> None:
    # Every upper half with lower halves around the ties, in a row that the step leaves as it is.
    upper = upper_halves()[:, None] << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).flatten().to(torch.uint32)
    param = bits.view(torch.float32).reshape(-1, 9 * 1024)
    row = AdamMatrix(
        param.clone(),
        torch.zeros_like(param),
        torch.ones_like(param),
        torch.zeros_like(param).to(copy),
    )
    hyper = HYPER.clone()
    hyper[0] = 0
    row_update(row, Gradient(), hyper, backend=backend)
    assert row.copy is not None
    expected = param.to(copy)
    is_nan = expected.isnan()
    assert torch.equal(row.copy.isnan(), is_nan)
    assert_bitwise("copy", row.copy[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("norm", ["unit", "at_most_one"])
def test_a_zero_row_stays_zero(norm: str, backend: str) -> None:
    zeros = torch.zeros(3, 10)
    row = AdamMatrix(zeros.clone(), zeros.clone(), zeros.clone(), zeros.to(torch.bfloat16))
    coef = Gradient(row_coef=torch.ones(3))  # the penalty on |w| has no gradient at 0
    row_update(row, coef, HYPER, norm=norm, backend=backend)
    for name, actual in zip(row._fields, row, strict=True):
        assert actual is not None
        assert_bitwise(name, actual, zeros.to(actual.dtype))


@pytest.mark.parametrize("lazy", [False, True], ids=["Adam", "SparseAdam"])
def test_twenty_steps_equal_those_of_torch(lazy: bool, backend: str) -> None:
    needs("row_update", torch.float64, backend)
    betas, lr = (0.9, 0.99), 0.03
    eps = 1e-100 if lazy else 1e-8  # SparseAdam scales its eps with the bias correction
    param = torch.randn(F, WIDTH, dtype=torch.float64)
    row = AdamMatrix(param.clone(), torch.zeros_like(param), torch.zeros_like(param))
    theirs = torch.nn.Parameter(param.clone())
    optimizer: torch.optim.Optimizer = (
        torch.optim.SparseAdam([theirs], lr=lr, betas=betas, eps=eps)
        if lazy
        else torch.optim.Adam([theirs], lr=lr, betas=betas, eps=eps)
    )
    for step in range(1, 21):
        grad = torch.randn(5, WIDTH, dtype=torch.float64)
        latents = torch.randperm(F)[:5]
        theirs.grad = torch.sparse_coo_tensor(
            latents[None], grad, (F, WIDTH), check_invariants=True
        )
        if not lazy:
            theirs.grad = theirs.grad.to_dense()
        optimizer.step()
        corrections = [1 - beta**step for beta in betas]
        hyper = torch.tensor([lr, 1.0, *corrections, 0.0, step], dtype=torch.float64)
        gradient = Gradient(dense=grad, dense_latents=latents.to(torch.int32))
        row_update(row, gradient, hyper, betas=betas, eps=eps, lazy=lazy, backend=backend)
    # The same gradients in both, so only the formula's own roundings differ: fewer than 16 a step
    # on the update (at most about lr / sqrt(1 - beta2) = 10 lr) and one on the parameter.
    budget = 20 * (gamma(16, torch.float64) * 10 * lr + gamma(1, torch.float64) * param.abs().max())
    assert_within("param", row.param, theirs, budget)


def test_a_parameter_is_updated_and_autograd_knows(backend: str) -> None:
    row = make_row(torch.float32, None)
    parameter = torch.nn.Parameter(row.param.clone())
    loss = parameter.square().sum()
    row_update(row._replace(param=parameter), Gradient(), HYPER, backend=backend)
    assert parameter.is_leaf
    assert not torch.equal(parameter, row.param)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_strided_gradient(backend: str) -> None:
    row = make_row(torch.float32, None)
    other = clone(row)
    gradient, _, _ = make_gradient(torch.float32, row)
    strided = Gradient(
        gradient.terms,
        *(
            None if t is None else torch.stack([t, torch.zeros_like(t)], -1)[..., 0]
            for t in gradient[1:]
        ),
    )
    row_update(row, gradient, HYPER, norm="unit", backend=backend)
    row_update(other, strided, HYPER, norm="unit", backend=backend)
    assert_bitwise("param", other.param, row.param)


def test_a_strided_hyper_tensor(backend: str) -> None:
    row = make_row(torch.float32, None)
    other = clone(row)
    table = torch.full((6, 2), torch.nan, dtype=torch.float64)
    table[:, 0] = HYPER
    row_update(row, Gradient(), HYPER, backend=backend)
    row_update(other, Gradient(), table[:, 0], backend=backend)
    assert_bitwise("param", other.param, row.param)


WRONG = pytest.mark.parametrize("wrong", [-2, F, F + 1, 2**31 - 1, -(2**31)])


@WRONG
def test_a_dense_latent_out_of_range_is_an_error(wrong: int, backend: str) -> None:
    if backend not in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} makes NaN of it, see the next test")
    row = make_row(torch.float32, None)
    latents = torch.tensor([0, wrong], dtype=torch.int32)
    gradient = Gradient(dense=torch.zeros(2, WIDTH), dense_latents=latents)
    with pytest.raises(IndexError, match=rf"dense_latents: expected .*{F}\), got {wrong}"):
        row_update(row, gradient, HYPER, backend=backend)


@WRONG
@pytest.mark.parametrize("lazy", [False, True], ids=["Adam", "SparseAdam"])
def test_a_dense_latent_out_of_range_is_nan_in_every_row(
    lazy: bool, wrong: int, backend: str
) -> None:
    if backend in CHECKED_ON_THE_HOST:
        pytest.skip(f"{backend} raises, see the test before")
    guarded = torch.zeros(3, F + 2, WIDTH)  # what lies around a matrix must stay as it is
    row = AdamMatrix(*(t[1:-1] for t in guarded))
    latents = torch.tensor([0, wrong], dtype=torch.int32)
    gradient = Gradient(dense=torch.ones(2, WIDTH), dense_latents=latents)
    row_update(row, gradient, HYPER, lazy=lazy, backend=backend)
    assert bool(row.param.isnan().all())
    assert bool((guarded[:, [0, -1]] == 0).all())


def test_repeats_are_bitwise_equal(backend: str) -> None:
    if gpu.interpreted():
        pytest.skip("Triton's interpreter runs programs one after the other")
    row = make_row(torch.float32, torch.bfloat16, 3)
    gradient, _, _ = make_gradient(torch.float32, row)
    first, again = clone(row), clone(row)
    for result in (first, again):
        row_update(result, gradient, HYPER, norm="unit", slices=3, backend=backend)
    for name, a, b in zip(row._fields, again, first, strict=True):
        assert a is not None
        assert b is not None
        assert_bitwise(name, a, b)


def test_hot_latents_train_like_others(backend: str) -> None:
    # Latent 1 is in every token, more than three chunks of entries; most latents are in none.
    n, n_latents = 900, 40
    indices = torch.tensor([[1, 30]], dtype=torch.int32).repeat(n, 1)
    indices[:, 1] = torch.randint(20, 33, (n,))
    coef, x = torch.randint(-2, 3, (n, 2)).float(), torch.randint(-2, 3, (n, 20)).float()
    order = LatentOrder(*transpose_codes(indices, None, None, n_latents, backend="reference"))
    dense = oracles.dense_codes(coef, indices, n_latents).T @ x.double()
    param, m, v = torch.randn(3, n_latents, 20).unbind()
    row, other = AdamMatrix(param, m, v.abs()), AdamMatrix(param.clone(), m.clone(), v.abs())
    row_update(row, Gradient([order.term(coef, x)]), HYPER, backend=backend)
    latents = torch.arange(n_latents, dtype=torch.int32)
    whole_gradient = Gradient(dense=dense.float(), dense_latents=latents)
    row_update(other, whole_gradient, HYPER, backend=backend)
    for name, actual, expected in zip(("param", "m", "v"), row[:3], other[:3], strict=True):
        assert_bitwise(name, actual, expected)  # integers: the same gradient in any order
    assert int(order.counts().max()) > 3 * 256
