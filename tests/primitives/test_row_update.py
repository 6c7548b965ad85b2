"""row_update on every backend against the dense fp64 step and against torch's optimizers."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.codes import LatentOrder
from sae_kernels.primitives.row_update import AdamRow, row_update
from sae_kernels.primitives.terms import Gradient, Term
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

F, WIDTH = 23, 36
COPIES = (torch.bfloat16, torch.float16)
HYPER = torch.tensor([0.01, 0.5, 1 - 0.9**3, 1 - 0.999**3, 0.0], dtype=torch.float64)


def make_row(
    high: torch.dtype, copy: torch.dtype | None, slices: int = 1, width: int = WIDTH
) -> AdamRow:
    """Unit slices and moments as after some steps, v well away from zero; a poisoned copy."""
    param = torch.randn(F, width, dtype=high).unflatten(1, (slices, -1))
    param = (param / param.norm(dim=-1, keepdim=True)).flatten(1)
    m, v = torch.randn(F, width, dtype=high), torch.rand(F, width, dtype=high) + 0.1
    return AdamRow(
        param, m, v, None if copy is None else torch.full_like(param, torch.nan).to(copy)
    )


def clone(row: AdamRow) -> AdamRow:
    """A row update works in place."""
    return AdamRow(*(None if t is None else t.clone() for t in row))  # type: ignore[arg-type]


def make_term(
    high: torch.dtype, source: torch.dtype | None, width: int
) -> tuple[Term, torch.Tensor, torch.Tensor]:
    """A term of 12 tokens on latents below 15, its dense gradient and the absolute terms of it."""
    indices = torch.rand(12, 15).argsort(dim=1)[:, :4].to(torch.int32)
    coef = torch.randn(12, 4, dtype=high)
    rows = torch.randn(12, width).to(source) if source else None
    order = LatentOrder(*transpose_codes(indices, None, None, F, backend="reference"))
    dense = oracles.dense_codes(coef, indices, F)
    source_rows = (torch.ones(12, width) if rows is None else rows).double()
    return order.term(coef, rows), dense.T @ source_rows, dense.abs().T @ source_rows.abs()


def make_gradient(high: torch.dtype, row: AdamRow) -> tuple[Gradient, torch.Tensor, torch.Tensor]:
    """Every part of a gradient at once; its sum in fp64 and the absolute terms of it."""
    width = row.param.shape[1]
    sources = (torch.float32, torch.bfloat16, None) if high == torch.float32 else (high, None)
    made = [make_term(high, source, width) for source in sources]
    row_coef = torch.randn(F, dtype=high)
    row_coef[::2] = 0
    dense = torch.randn(4, width, dtype=high)
    dense[1] = torch.nan  # an unused row may hold anything
    latents = torch.tensor([20, -1, 3, 0], dtype=torch.int32)
    param = row.param.double()
    penalty = row_coef.double()[:, None] * param / param.norm(dim=1, keepdim=True)
    grad = sum((dense for _, dense, _ in made), penalty)
    magnitude = sum((terms for _, _, terms in made), penalty.abs())
    grad[[20, 3, 0]] += dense[[0, 2, 3]].double()
    magnitude[[20, 3, 0]] += dense[[0, 2, 3]].abs().double()
    return Gradient([term for term, _, _ in made], row_coef, dense, latents), grad, magnitude


@pytest.mark.parametrize("high", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("norm", ["none", "unit", "at_most_one"])
@pytest.mark.parametrize("slices", [1, 3], ids=["whole", "slices"])
@pytest.mark.parametrize("width", [WIDTH, 3 * 43], ids=["width-36", "width-129"])
def test_a_step_against_the_oracle(
    width: int, slices: int, norm: str, high: torch.dtype, backend: str
) -> None:
    row = make_row(high, torch.bfloat16 if high == torch.float32 else None, slices, width)
    gradient, grad, magnitude = make_gradient(high, row)
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
    row, other = make_row(torch.float64, None), make_row(torch.float64, None)
    other = AdamRow(row.param.clone(), row.m.clone(), row.v.clone())
    latents = torch.arange(F, dtype=torch.int32)
    along = Gradient(dense=3.0 * row.param, dense_latents=latents)
    row_update(row, along, HYPER, norm="unit", backend=backend)
    row_update(other, Gradient(), HYPER, norm="unit", backend=backend)
    # <w, w> is 1 up to gamma(WIDTH + 2): that much of the gradient is left over.
    left = 3 * 2 * gamma(WIDTH + 2, torch.float64)
    assert_within("m", row.m, other.m, left)


def test_a_vector_of_width_one_takes_a_source_of_ones(backend: str) -> None:
    row = make_row(torch.float64, None, width=1)
    before = oracles.AdamState(*(t.clone() for t in row[:3]))
    term, grad, magnitude = make_term(torch.float64, None, 1)
    row_update(row, Gradient([term]), HYPER, backend=backend)
    expected = oracles.row_update(before, grad, HYPER)
    dg = rounding(14, magnitude, torch.float64)
    budgets = adam_budgets(before, HYPER[1] * grad, dg, HYPER, torch.float64)
    for name, actual, want, budget in zip(
        ("param", "m", "v"), row[:3], expected, budgets, strict=True
    ):
        assert actual is not None
        assert_within(name, actual, want, budget)


@pytest.mark.parametrize("norm", ["none", "unit", "at_most_one"])
def test_lazy_leaves_rows_without_an_entry_bitwise_alone(norm: str, backend: str) -> None:
    row = make_row(torch.float32, torch.bfloat16)
    gradient, _, _ = make_gradient(torch.float32, row)
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


@pytest.mark.parametrize("flag", [1.0, -1.0, torch.nan], ids=str)
def test_the_skip_flag_leaves_everything_bitwise_alone(flag: float, backend: str) -> None:
    row = make_row(torch.float32, torch.float16)
    gradient, _, _ = make_gradient(torch.float32, row)
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
    upper = torch.arange(1 << 16)[:, None] << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).flatten().to(torch.uint32)
    param = bits.view(torch.float32).reshape(-1, 9 * 64)
    row = AdamRow(
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
    row = AdamRow(zeros.clone(), zeros.clone(), zeros.clone(), zeros.to(torch.bfloat16))
    coef = Gradient(row_coef=torch.ones(3))  # the penalty on |w| has no gradient at 0
    row_update(row, coef, HYPER, norm=norm, backend=backend)
    for name, actual in zip(row._fields, row, strict=True):
        assert actual is not None
        assert_bitwise(name, actual, zeros.to(actual.dtype))


@pytest.mark.parametrize("lazy", [False, True], ids=["Adam", "SparseAdam"])
def test_twenty_steps_equal_those_of_torch(lazy: bool, backend: str) -> None:
    betas, lr = (0.9, 0.99), 0.03
    eps = 1e-100 if lazy else 1e-8  # SparseAdam scales its eps with the bias correction
    param = torch.randn(F, WIDTH, dtype=torch.float64)
    row = AdamRow(param.clone(), torch.zeros_like(param), torch.zeros_like(param))
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
        hyper = torch.tensor([lr, 1.0, *corrections, 0.0], dtype=torch.float64)
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


def test_a_strided_hyper_tensor(backend: str) -> None:
    row = make_row(torch.float32, None)
    other = clone(row)
    table = torch.full((5, 2), torch.nan, dtype=torch.float64)
    table[:, 0] = HYPER
    row_update(row, Gradient(), HYPER, backend=backend)
    row_update(other, Gradient(), table[:, 0], backend=backend)
    assert_bitwise("param", other.param, row.param)


@pytest.mark.parametrize("copy", COPIES, ids=lambda dtype: str(dtype)[6:])
def test_repeats_and_thread_counts_are_bitwise_equal(copy: torch.dtype, isa: str) -> None:
    row = make_row(torch.float32, copy, 3)
    gradient, _, _ = make_gradient(torch.float32, row)
    results = []
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        results.append(clone(row))
        row_update(results[-1], gradient, HYPER, norm="unit", slices=3, backend="cpu")
        for name, a, b in zip(row._fields, results[-1], results[0], strict=True):
            assert a is not None
            assert b is not None
            assert_bitwise(f"{name}, repeat {repeat}", a, b)


@pytest.mark.parametrize("wrong", [-2, F, 2**31 - 1])
def test_a_dense_latent_out_of_range_is_an_error(wrong: int, backend: str) -> None:
    row = make_row(torch.float32, None)
    latents = torch.tensor([0, wrong], dtype=torch.int32)
    gradient = Gradient(dense=torch.zeros(2, WIDTH), dense_latents=latents)
    with pytest.raises(IndexError, match=rf"dense_latents: expected .*{F}\), got {wrong}"):
        row_update(row, gradient, HYPER, backend=backend)
