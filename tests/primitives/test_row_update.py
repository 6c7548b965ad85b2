"""row_update on every backend against the dense fp64 step and against torch's optimizers."""

from __future__ import annotations

import pytest
import torch
from refusals import needs

from sae_kernels import backends, gpu
from sae_kernels.codes import LatentOrder
from sae_kernels.primitives.row_update import AdamRow, halves, row_update
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

PRIMITIVES = ("row_update",)
# The others run where the host cannot look at latents without waiting for the device.
CHECKED_ON_THE_HOST = ("reference", "cpu")
F, WIDTH = 23, 36
COPIES = (torch.bfloat16, torch.float16)
HYPER = torch.tensor([0.01, 0.5, 1 - 0.9**3, 1 - 0.999**3, 0.0, 3.0], dtype=torch.float64)
# How a matrix lies in memory: in fp32, with bf16 moments, in halves, and both.
LAYOUTS = ("fp32", "moments", "split", "moments-split")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
ULP = 2.0**-7  # of bf16: what stochastic rounding is off by, at most


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


def laid_out(row: AdamRow, layout: str, backend: str) -> AdamRow:
    """The same row in another layout; skips layouts that the backend has no kernel for."""
    param, m, v, copy = clone(row)
    if "moments" in layout:
        m, v = m.to(torch.bfloat16), v.to(torch.bfloat16)
    if "split" in layout:
        copy, param = halves.split(param)
    refused = backend == "cpu" and layout != "fp32"
    if refused:
        with pytest.raises(backends.BackendUnavailableError, match=r"cpu: no kernel for"):
            row_update(AdamRow(param, m, v, copy), Gradient(), HYPER, backend=backend)
        pytest.skip(f"{backend} has no kernel for this layout and says so")
    return AdamRow(param, m, v, copy)


def whole(row: AdamRow) -> torch.Tensor:
    """The weights in fp32, from whatever layout."""
    split = row.param.dtype == torch.int16 and row.copy is not None
    return halves.joined(row.copy, row.param) if split else row.param


def clone(row: AdamRow) -> AdamRow:
    """A row update works in place."""
    return AdamRow(*(None if t is None else t.clone() for t in row))  # type: ignore[arg-type]


def takes(row: AdamRow, gradient: Gradient, backend: str) -> None:
    """Skips a test of such an update where the backend has no kernel for it."""
    arguments = (*row, *gradient.columns(), HYPER, 0.9, 0.999, 1e-8, "none", 1, False)
    needs("row_update", row.param.dtype, backend, arguments)


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


def make_gradient(
    high: torch.dtype, row: AdamRow, parts: int | None = None
) -> tuple[Gradient, torch.Tensor, torch.Tensor]:
    """Every part of a gradient at once; its sum in fp64 and the absolute terms of it.

    ``parts`` of a row have a penalty each; None stands for one coefficient a row.
    """
    width = row.param.shape[1]
    sources = (torch.float32, torch.bfloat16, None) if high == torch.float32 else (high, None)
    made = [make_term(high, source, width) for source in sources]
    row_coef = torch.randn(F, *([] if parts is None else [parts]), dtype=high)
    row_coef[::2] = 0
    dense = torch.randn(4, width, dtype=high)
    dense[1] = torch.nan  # an unused row may hold anything
    latents = torch.tensor([20, -1, 3, 0], dtype=torch.int32)
    penalty = oracles.row_penalty(row.param, row_coef)
    grad = sum((dense for _, dense, _ in made), penalty)
    magnitude = sum((terms for _, _, terms in made), penalty.abs())
    grad[[20, 3, 0]] += dense[[0, 2, 3]].double()
    magnitude[[20, 3, 0]] += dense[[0, 2, 3]].abs().double()
    return Gradient([term for term, _, _ in made], row_coef, dense, latents), grad, magnitude


@pytest.mark.parametrize("high", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("norm", ["none", "unit", "at_most_one"])
@pytest.mark.parametrize("slices", [1, 3], ids=["whole", "slices"])
@pytest.mark.parametrize("width", [WIDTH, 3 * 43], ids=["width-36", "width-129"])
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
    row = AdamRow(param, torch.zeros(2, 6), torch.zeros(2, 6))
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
    row = laid_out(row, layout, backend)
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
    row = laid_out(row, layout, backend)
    before, hyper = clone(row), HYPER.clone()
    hyper[1], hyper[4] = torch.nan, flag  # as after a norm that is not finite
    row_update(row, gradient, hyper, norm="unit", backend=backend)
    for name, actual, old in zip(row._fields, row, before, strict=True):
        assert actual is not None
        assert old is not None
        assert_bitwise(name, actual, old)


def upper_halves() -> torch.Tensor:
    """The upper 16 bits of every fp32 number; of an eighth of them in Triton's interpreter."""
    if gpu.interpreted():
        eighth = torch.arange(1 << 13)
        return eighth * 8 + eighth % 8
    return torch.arange(1 << 16)


@pytest.mark.parametrize("copy", COPIES, ids=lambda dtype: str(dtype)[6:])
def test_the_copy_is_the_rounded_parameter(copy: torch.dtype, backend: str) -> None:
    # Every upper half with lower halves around the ties, in a row that the step leaves as it is.
    upper = upper_halves()[:, None] << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).flatten().to(torch.uint32)
    param = bits.view(torch.float32).reshape(-1, 9 * 1024)
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
    needs("row_update", torch.float64, backend)
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
    row = AdamRow(*(t[1:-1] for t in guarded))
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


@pytest.mark.parametrize("norm", ["none", "unit"])
@pytest.mark.parametrize("moments", ["", "moments-"], ids=["fp32", "bf16"])
def test_a_split_master_trains_bitwise_like_a_whole_one(
    moments: str, norm: str, backend: str
) -> None:
    row = make_row(torch.float32, torch.bfloat16)
    row = row._replace(copy=row.param.bfloat16())
    split = laid_out(row, moments + "split", backend)
    row = laid_out(row, moments + "fp32", backend)
    for step in range(1, 6):
        gradient, _, _ = make_gradient(torch.float32, row)
        hyper = HYPER.clone()
        hyper[5] = step
        for updated in (row, split):
            row_update(updated, gradient, hyper, norm=norm, lazy=True, backend=backend)
        assert_bitwise("param", whole(split), row.param)
        assert_bitwise("m", split.m, row.m)
        assert_bitwise("v", split.v, row.v)
        assert split.copy is not None
        assert row.copy is not None
        apart = split.copy != row.copy  # at exact ties only, and none is among these numbers
        assert not bool(apart.any())


def numbers_of_all_kinds() -> torch.Tensor:
    """Every upper half of an fp32 number with lower halves around the ties."""
    upper = upper_halves()[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper | lower).flatten()
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)


def test_halves_are_exact_and_the_high_one_is_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers_of_all_kinds().view(-1, 96)
    monkeypatch.setattr(halves, "_CHUNK", 1000)
    high, low = halves.split(values)
    is_nan = values.isnan()
    back = halves.joined(high, low)
    assert_bitwise("values", back[~is_nan], values[~is_nan])
    assert torch.equal(high.isnan(), is_nan)
    assert bool(back[is_nan].isnan().all())
    finite = values.isfinite() & (values.abs() < torch.finfo(torch.bfloat16).max)
    off, nearest = ((t.double() - values.double()).abs()[finite] for t in (high, values.bfloat16()))
    assert torch.equal(off, nearest)
    out = torch.empty_like(values)
    assert halves.joined(high, low, out=out) is out
    assert_bitwise("out", out, back)


def test_an_update_keeps_all_bits_of_halves_that_it_does_not_move(backend: str) -> None:
    values = numbers_of_all_kinds().view(-1, 6 * 1024)
    zeros = torch.zeros_like(values)
    row = laid_out(AdamRow(values, zeros, zeros + 1), "split", backend)
    before, hyper = clone(row), HYPER.clone()
    hyper[0] = 0
    row_update(row, Gradient(), hyper, backend=backend)
    assert_bitwise("low", row.param, before.param)
    assert row.copy is not None
    assert before.copy is not None
    assert torch.equal(row.copy.isnan(), before.copy.isnan())
    there = ~row.copy.isnan()
    assert_bitwise("high", row.copy[there], before.copy[there])


def test_every_backend_draws_the_same_bits(backend: str) -> None:
    # Integers and betas of one half: m and v are exact in fp32, so only the bits decide.
    width, steps = 300, 3
    zeros = torch.zeros(F, width)
    row = laid_out(AdamRow(zeros, zeros, zeros), "moments", backend)
    other = clone(row)
    grads = [torch.randint(-2047, 2048, (F, width)).float() for _ in range(steps)]
    latents = torch.arange(F, dtype=torch.int32)
    for step, grad in enumerate(grads, 1):
        hyper = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, step], dtype=torch.float64)
        for updated, name in ((row, backend), (other, "reference")):
            before = clone(updated)
            gradient = Gradient(dense=grad, dense_latents=latents)
            row_update(updated, gradient, hyper, betas=(0.5, 0.5), backend=name)
            exact = 0.5 * before.m.double() + 0.5 * grad.double()
            assert_within("m", updated.m, exact, ULP * exact.abs())
        assert_bitwise("m", row.m, other.m)
        assert_bitwise("v", row.v, other.v)
    assert not torch.equal(row.m, (grads[-1] / 2).bfloat16())


def test_bits_differ_between_steps_columns_latents_and_moments(backend: str) -> None:
    def rounded(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.full((64, 64), 1 + 2.0**-8)  # between 1 and the next bf16 number
        row = laid_out(AdamRow(torch.zeros(64, 64), half * 0, half * 0), "moments", backend)
        hyper = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, step], dtype=torch.float64)
        latents = torch.arange(64, dtype=torch.int32)
        gradient = Gradient(dense=half, dense_latents=latents)
        row_update(row, gradient, hyper, betas=(0.0, 0.0), backend=backend)
        return row.m > 1, row.v > 1

    (m, v), (later, _) = rounded(1), rounded(2)
    # Of 4096 fair coins (m; v is somewhat above the middle), 6 standard deviations of agreement.
    band = 6 * (0.25 / 4096) ** 0.5
    for name, other in (
        ("v", v),
        ("the next step", later),
        ("the next latent", m.roll(1, 0)),
        ("the next column", m.roll(1, 1)),
        ("the transposed", m.T),
    ):
        agreement = (m == other).double().mean()
        assert abs(float(agreement) - 0.5) < band, f"m against {name}: {float(agreement):.3f}"


def test_a_second_moment_in_bf16_decays_as_it_should(backend: str) -> None:
    # Under nearest rounding it would stay at 1 for ever.
    shape, steps = (4, 1024), 50
    ones = torch.ones(shape)
    row = laid_out(AdamRow(ones * 0, ones * 0, ones), "moments", backend)
    for step in range(1, steps + 1):
        hyper = HYPER.clone()
        hyper[5] = step
        row_update(row, Gradient(), hyper, backend=backend)
    # Independent roundings, each of variance at most (ulp / 2)^2 with an ulp of 2^-8 below 1.
    deviation = (steps * (2.0**-8 / 2) ** 2 / ones.numel()) ** 0.5
    off = float(row.v.double().mean()) - 0.999**steps
    assert abs(off) < 6 * deviation + gamma(steps, torch.float32)
    assert 6 * deviation < (1 - 0.999**steps) / 10, "the test would not see that nothing decays"


def test_fifty_steps_with_moments_in_bf16_stay_within_their_roundings(backend: str) -> None:
    row = make_row(torch.float32, torch.bfloat16)
    exact = oracles.AdamState(*(t.bfloat16().double() for t in row[:3]))
    row = laid_out(row._replace(param=exact.param.float()), "moments-split", backend)
    latents = torch.arange(F, dtype=torch.int32)
    off_param = off_m = off_v = torch.zeros(F, WIDTH, dtype=torch.float64)
    for step in range(1, 51):
        corrections = [1 - beta**step for beta in (0.9, 0.999)]
        hyper = torch.tensor([1e-3, 1.0, *corrections, 0.0, step], dtype=torch.float64)
        grad = torch.randn(F, WIDTH)
        row_update(row, Gradient(dense=grad, dense_latents=latents), hyper, backend=backend)
        moved, off_m, off_v = adam_budgets(
            exact,
            grad.double(),
            torch.zeros(F, WIDTH, dtype=torch.float64),
            hyper,
            torch.float32,
            moment_budgets=(off_m, off_v),
        )
        exact = oracles.row_update(exact, grad, hyper)
        off_param = off_param + moved
        off_m = off_m + ULP * (exact.m.abs() + off_m)
        off_v = off_v + ULP * (exact.v + off_v)
        assert_within("m", row.m, exact.m, off_m)
        assert_within("v", row.v, exact.v, off_v)
        assert_within("param", whole(row), exact.param, off_param)
    # On average the roundings cancel: far below the bound, in which every one has the same sign.
    v = row.v.double()
    assert abs(float((v / exact.v).mean()) - 1) < 6 * ULP * (50 / v.numel()) ** 0.5


def test_moments_in_bf16_keep_nan_and_infinity(backend: str) -> None:
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan, 3e38, 1e-42]).repeat(6, 50)
    bad.view(torch.int32)[:, ::6] = 0x7FFFFFFF  # a NaN that a carry would turn into -0
    zeros = torch.zeros_like(bad)
    row = laid_out(AdamRow(zeros, zeros, zeros), "moments", backend)
    latents = torch.arange(6, dtype=torch.int32)
    hyper = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    gradient = Gradient(dense=bad, dense_latents=latents)
    row_update(row, gradient, hyper, betas=(0.0, 0.0), backend=backend)
    assert torch.equal(row.m.isnan(), bad.isnan())
    assert torch.equal(row.v.isnan(), bad.isnan())
    special = ~bad.isnan() & ~bad.isfinite()
    assert torch.equal(row.m[special].float(), bad[special])
    assert bool((row.v[special] == torch.inf).all())
    finite = bad.isfinite()
    assert_within("m", row.m[finite], bad[finite].double(), ULP * bad[finite].abs() + 1e-40)


def test_hot_latents_train_like_others(backend: str) -> None:
    # Latent 1 is in every token, more than three chunks of entries; most latents are in none.
    n, n_latents = 900, 40
    indices = torch.tensor([[1, 30]], dtype=torch.int32).repeat(n, 1)
    indices[:, 1] = torch.randint(20, 33, (n,))
    coef, x = torch.randint(-2, 3, (n, 2)).float(), torch.randint(-2, 3, (n, 20)).float()
    order = LatentOrder(*transpose_codes(indices, None, None, n_latents, backend="reference"))
    dense = oracles.dense_codes(coef, indices, n_latents).T @ x.double()
    param, m, v = torch.randn(3, n_latents, 20).unbind()
    row, other = AdamRow(param, m, v.abs()), AdamRow(param.clone(), m.clone(), v.abs())
    row_update(row, Gradient([order.term(coef, x)]), HYPER, backend=backend)
    latents = torch.arange(n_latents, dtype=torch.int32)
    whole_gradient = Gradient(dense=dense.float(), dense_latents=latents)
    row_update(other, whole_gradient, HYPER, backend=backend)
    for name, actual, expected in zip(("param", "m", "v"), row[:3], other[:3], strict=True):
        assert_bitwise(name, actual, expected)  # integers: the same gradient in any order
    assert int(order.counts().max()) > 3 * 256


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_without_a_kernel_for_a_layout_the_specification_runs(layout: str) -> None:
    row = laid_out(make_row(torch.float32, torch.bfloat16), layout, "reference")
    automatic, explicit = clone(row), clone(row)
    row_update(automatic, Gradient(), HYPER)
    row_update(explicit, Gradient(), HYPER, backend="reference")
    for name, a, e, old in zip(row._fields, automatic, explicit, row, strict=True):
        assert a is not None
        assert e is not None
        assert old is not None
        assert_bitwise(name, a, e)
        assert not torch.equal(a, old)
