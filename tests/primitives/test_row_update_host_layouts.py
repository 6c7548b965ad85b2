"""The host kernels' layouts hold the fp32 one's numbers, cut as the reference cuts them.

The reference sums in another order than the kernels, so that a gradient of random numbers differs
by roundings. What a layout adds to the update, halves and random bits, has one right value.
"""

from __future__ import annotations

import itertools

import pytest
import rows
import torch
from rows import COPIES, HYPER, LAYOUTS, clone, laid_out, make_gradient, make_row, whole

from sae_kernels.primitives.row_update import AdamMatrix, halves, reference, row_update
from sae_kernels.primitives.terms import Gradient
from sae_kernels.testing import assert_bitwise

small = pytest.mark.parametrize("layout", LAYOUTS[1:])
# Slices and parts of a row, its width (of tails in every variant), lazy.
SHAPES = list(itertools.product((1, 3), (None, 3), (3, 36, 129), (False, True)))


def assert_same_matrix(actual: AdamMatrix, expected: AdamMatrix, case: object) -> None:
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            assert_bitwise(f"{name} of {case}", a, e)


def recut(row: AdamMatrix, before: AdamMatrix, moved: torch.Tensor) -> AdamMatrix:
    """An updated fp32 matrix in the layout of ``before``, whose rows stay but the moved."""
    high, low = halves.split(row.param)
    bits = reference.noise(int(HYPER[5]), row.m.shape, row.m.device)
    parts = (
        low if before.param.dtype == torch.int16 else row.param,
        halves.cut(row.m, bits & 0xFFFF) if before.m.dtype == torch.bfloat16 else row.m,
        halves.cut(row.v, bits >> 16) if before.m.dtype == torch.bfloat16 else row.v,
        high if before.param.dtype == torch.int16 else row.copy,
    )
    return AdamMatrix(
        *(
            None if old is None or new is None else torch.where(moved[:, None], new, old)
            for old, new in zip(before, parts, strict=True)
        )  # type: ignore[arg-type]
    )


def rows_with_an_entry(gradient: Gradient) -> torch.Tensor:
    """Which latents any part of a gradient names."""
    assert gradient.row_coef is not None
    assert gradient.dense_latents is not None
    found = gradient.row_coef.view(rows.F, -1).ne(0).any(1)
    for term in gradient.terms:
        found = found | (term.offsets.diff() > 0)
    found[gradient.dense_latents[gradient.dense_latents >= 0].long()] = True
    return found


def put_odd_numbers(row: AdamMatrix) -> None:
    """Denormals, infinities, NaN of several payloads, zeros and a negative second moment."""
    for tensor in row[:3]:
        assert tensor is not None
        tensor.view(-1)[::7] *= 1e-39
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000], dtype=torch.int32)
    row.param[4, ::3], row.param[5], row.param[6, 1] = torch.inf, 0, -0.0
    row.m[7, ::2], row.v[8, ::2], row.v[9, 1] = -torch.inf, torch.inf, -1
    for latent, tensor in ((10, row.param), (11, row.m), (12, row.v)):
        tensor[latent, 0::2] = nan.view(torch.float32)[latent % 4]


@small
@pytest.mark.parametrize("odd", [False, True], ids=["numbers", "odd-numbers"])
@pytest.mark.parametrize("norm", ["none", "unit", "at_most_one"])
def test_a_layout_is_the_fp32_update_cut_as_the_reference_cuts(
    norm: str, odd: bool, layout: str, isa: str
) -> None:
    for case in SHAPES:
        slices, parts, width, lazy = case
        row = make_row(torch.float32, torch.bfloat16, slices, width)
        gradient, _, _ = make_gradient(torch.float32, row, parts)
        if odd:
            put_odd_numbers(row)
        before = laid_out(row, layout)
        updated = clone(before)
        plain = clone(AdamMatrix(whole(before), before.m.float(), before.v.float(), row.copy))
        for changed in (updated, plain):
            row_update(changed, gradient, HYPER, norm=norm, slices=slices, lazy=lazy, backend="cpu")
        moved = rows_with_an_entry(gradient) if lazy else torch.ones(rows.F, dtype=torch.bool)
        assert_same_matrix(updated, recut(plain, before, moved), case)
        assert not torch.equal(updated.m, before.m)


@small
@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_where_every_operation_is_exact_the_kernel_has_the_references_bits(
    lazy: bool, layout: str, isa: str
) -> None:
    # Integers in every part of the gradient, and with betas of 0 a move by lr times a sign.
    row = make_row(torch.float32, torch.bfloat16, width=129)
    row.param[:] = 0
    row.param[:, :2] = torch.tensor([3.0, 4.0])  # norms of 5 for the penalty
    gradient, _, _ = make_gradient(torch.float32, row)
    terms = [
        term._replace(
            coef=(8 * term.coef).round(),
            source=None if term.source is None else (8 * term.source).round(),
        )
        for term in gradient.terms
    ]
    assert gradient.row_coef is not None
    assert gradient.dense is not None
    gradient = gradient._replace(
        terms=terms,
        row_coef=5 * (2 * gradient.row_coef).round(),
        dense=(100 * gradient.dense).round(),
    )
    hyper = torch.tensor([0.25, 1.0, 1.0, 1.0, 0.0, 9.0], dtype=torch.float64)
    ours = laid_out(row, layout)
    specified = clone(ours)
    for changed, backend in ((ours, "cpu"), (specified, "reference")):
        row_update(
            changed, gradient, hyper, betas=(0.0, 0.0), eps=1e-30, lazy=lazy, backend=backend
        )
    assert_same_matrix(ours, specified, layout)
    assert ours.m.float().unique().numel() > 200, "hardly a number to round"


@pytest.mark.parametrize("shape", [(70_003, 3), (2, 70_003)], ids=["latents", "columns"])
@pytest.mark.parametrize("step", [0, 12_345, 2**31 + 1, 2**40 + 7])
def test_the_bits_far_out_are_the_references(step: int, shape: tuple[int, int], isa: str) -> None:
    half = torch.full((1, 1), 1 + 2.0**-8).expand(shape).contiguous()
    gradient = Gradient(dense=half, dense_latents=torch.arange(shape[0], dtype=torch.int32))
    hyper = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, step], dtype=torch.float64)
    zeros = torch.zeros(shape)
    row = laid_out(AdamMatrix(zeros, zeros, zeros), "moments")
    row_update(row, gradient, hyper, betas=(0.0, 0.0), backend="cpu")
    bits = reference.noise(step, half.shape, half.device)
    assert_bitwise("m", row.m, halves.cut(half, bits & 0xFFFF))
    assert_bitwise("v", row.v, halves.cut(half * half, bits >> 16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("copy", COPIES, ids=lambda dtype: str(dtype)[6:])
def test_repeats_and_thread_counts_are_bitwise_equal(
    copy: torch.dtype, layout: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "F", 300)  # threads share out 64 rows at a time
    row = laid_out(make_row(torch.float32, copy, 3), layout)
    gradient, _, _ = make_gradient(torch.float32, row._replace(param=whole(row)))
    results = []
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        results.append(clone(row))
        row_update(results[-1], gradient, HYPER, norm="unit", slices=3, backend="cpu")
        assert_same_matrix(results[-1], results[0], f"repeat {repeat}")
    assert not torch.equal(results[0].m, row.m)
