"""row_update of matrices in halves and with moments in bf16: the same training in fewer bytes."""

from __future__ import annotations

import pytest
import torch
from rows import (
    HYPER,
    ULP,
    WIDTH,
    F,
    clone,
    laid_out,
    make_gradient,
    make_row,
    upper_halves,
    whole,
)

from sae_kernels.primitives.row_update import AdamMatrix, halves, row_update
from sae_kernels.primitives.terms import Gradient
from sae_kernels.testing import (
    adam_budgets,
    assert_bitwise,
    assert_within,
    gamma,
    oracles,
)

PRIMITIVES = ("row_update",)


@pytest.mark.parametrize("norm", ["none", "unit"])
@pytest.mark.parametrize("moments", ["", "moments-"], ids=["fp32", "bf16"])
def test_a_split_master_trains_bitwise_like_a_whole_one(
    moments: str, norm: str, backend: str
) -> None:
    row = make_row(torch.float32, torch.bfloat16)
    row = row._replace(copy=row.param.bfloat16())
    split = laid_out(row, moments + "split")
    row = laid_out(row, moments + "fp32")
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
    row = laid_out(AdamMatrix(values, zeros, zeros + 1), "split")
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
    row = laid_out(AdamMatrix(zeros, zeros, zeros), "moments")
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
        row = laid_out(AdamMatrix(torch.zeros(64, 64), half * 0, half * 0), "moments")
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
    row = laid_out(AdamMatrix(ones * 0, ones * 0, ones), "moments")
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
    row = laid_out(row._replace(param=exact.param.float()), "moments-split")
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
    row = laid_out(AdamMatrix(zeros, zeros, zeros), "moments")
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
