"""Edits of codes, kept sparse, against the same edits of dense codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from dense_edits import D, F, Place, edit_all
from torch import Tensor

from sae_kernels import SparseCodes, functional
from sae_kernels.interventions import (
    EditBank,
    ablate,
    add,
    clamp,
    edit_codes,
    keep_only,
    mean_codes,
    resample,
    scale,
    set_to,
    steer,
)
from sae_kernels.nn import JumpReLUSAE, TopKSAE

if TYPE_CHECKING:
    from sae_kernels.interventions import Edit

T, P = 24, 3  # tokens, and the length of every prompt


@pytest.fixture(scope="module")
def sae() -> TopKSAE:
    torch.manual_seed(0)
    return TopKSAE(D, F, k=6, activation_scale=0.5).double().requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def codes(sae: TopKSAE, x: Tensor) -> SparseCodes:
    return sae.encode(x)


def ragged(codes: SparseCodes) -> SparseCodes:
    """The same codes as ragged ones, without dropped entries."""
    dense = codes.to_dense()
    tokens, latents = dense.nonzero().unbind(1)
    counts = torch.bincount(tokens, minlength=len(dense)).cumsum(0)
    offsets = torch.cat([counts.new_zeros(1), counts]).int()
    return SparseCodes(dense[tokens, latents], latents.int(), codes.n_latents, offsets)


def often(codes: SparseCodes, n: int) -> list[int]:
    """Latents that fire in many tokens, but not in all."""
    counts = (codes.to_dense() != 0).sum(0)
    order = torch.where(counts < T, counts, 0).argsort(descending=True)
    return [int(latent) for latent in order[:n]]


def cases(codes: SparseCodes) -> dict[str, list[Edit]]:
    a, b, c, d = often(codes, 4)
    means = mean_codes(codes)
    return {
        "scale": [scale([a, b], -1.5)],
        "add": [add(a, 0.75)],
        "add negative": [add([a, c], -20.0)],
        "clamp from above": [clamp(a, high=0.1)],
        "clamp from below": [clamp([a, b], low=0.5, high=2.0)],
        "set": [set_to([b, d], 3.0)],
        "ablate": [ablate([a, b, c])],
        "ablate to means": [ablate([c, a], to=means)],
        "resample": [resample([a, b], codes)],
        "keep only": [keep_only([a, b])],
        "keep none": [keep_only([])],
        "keep, and scale another": [keep_only([a]), scale(b, 2.0)],
        "keep and scale it": [keep_only([a, b]), scale(b, 2.0), add(c, 1.0)],
        "keep in the prompt": [keep_only([a], at="prompt")],
        "keep in a row": [keep_only([a], rows=1), ablate(a, rows=0)],
        "keep at a run of positions": [keep_only([a, b], at=[1, 2, 3])],
        "when another fires": [set_to(a, 2.0, when=b), scale(c, 0.0, when=a)],
        "add when it fires itself": [add(a, 1.0, when=a)],
        "rows": [set_to(a, 1.0, rows=0), set_to(a, 2.0, rows=[1, 2]), scale(b, 3.0, rows=2)],
        "prompt and generated": [set_to(a, 1.0, at="prompt"), scale(a, 2.0, at="generated")],
        "positions": [set_to(a, 4.0, at=[0, 2, 3, 5]), set_to(b, 5.0, at=-1)],
    }


NAMES = list(cases(SparseCodes.from_dense(torch.rand(T, F), k=6)))


def bank_for(sae: TopKSAE, edits: list[Edit], rows: int, pool_size: int = T) -> EditBank:
    bank = EditBank(sae, rows, n_slots=6, n_directions=4, keeps_only=True, pool_size=pool_size)
    for row in range(rows):
        mine = [edit for edit in edits if edit.rows is None or row in edit.rows]
        bank.write(row, mine, prompt_length=P)
    return bank


def places() -> tuple[list[Place], Tensor, Tensor]:
    """Tokens of three rows, eight positions each, mixed."""
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    rows, positions = order // 8, order % 8
    both = zip(rows.tolist(), positions.tolist(), strict=True)
    return [Place(row, position, P) for row, position in both], rows, positions


@pytest.mark.parametrize("form", ["fixed", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_edited_as_dense_ones(
    sae: TopKSAE, codes: SparseCodes, name: str, form: str
) -> None:
    edits = cases(codes)[name]
    where, rows, positions = places()
    dense = codes.to_dense()
    want = edit_all(dense, edits, where)
    assert not torch.equal(want, dense), "the case changes something"
    bank = bank_for(sae, edits, 3)
    given = codes if form == "fixed" else ragged(codes)
    got = edit_codes(given, bank, rows, positions)
    directions = any(bank.directions.any(-1).flatten())  # adds are directions, not entries
    if not directions:
        assert torch.equal(got.to_dense(), want)
    assert got.batch_shape == given.batch_shape


@pytest.mark.parametrize("name", NAMES)
def test_activations_move_by_the_decoded_difference(
    sae: TopKSAE, x: Tensor, codes: SparseCodes, name: str
) -> None:
    edits = cases(codes)[name]
    where, rows, positions = places()
    dense = codes.to_dense()
    change = edit_all(dense, edits, where) - dense
    want = x + change @ sae.W_dec / sae.target_scale
    got = bank_for(sae, edits, 3)(x, rows, positions)
    # Sums of at most 12 terms in fp64, some of them 20 times a decoder row of norm 1.
    torch.testing.assert_close(got, want, rtol=0, atol=12 * 50 * torch.finfo(torch.float64).eps)
    still = (change == 0).all(1)
    assert torch.equal(got[still], x[still])


def test_ragged_saes_are_edited_too(x: Tensor) -> None:
    sae = JumpReLUSAE(D, F).double().requires_grad_(False)
    codes = sae.encode(x)
    assert codes.offsets is not None
    a, b, c, _ = often(codes, 4)
    edits = [set_to(a, 2.0, when=b), ablate(c), keep_only([a, b], at="generated")]
    where, rows, positions = places()
    dense = codes.to_dense()
    want = edit_all(dense, edits, where)
    bank = bank_for(sae, edits, 3)
    assert torch.equal(edit_codes(codes, bank, rows, positions).to_dense(), want)
    moved = bank(x, rows, positions)
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(moved, x + (want - dense) @ sae.W_dec, rtol=0, atol=50 * F * eps)


def test_entries_of_edited_codes(sae: TopKSAE, x: Tensor) -> None:
    codes = sae.encode(x.view(4, 6, D))
    a, b = often(codes.flat(), 2)
    bank = bank_for(sae, [set_to(a, 1.0), scale(b, 2.0)], 1)
    got = edit_codes(codes, bank)
    assert (got.batch_shape, got.k) == ((4, 6), codes.k + bank.n_slots)
    assert torch.equal(got.indices[..., : codes.k], codes.indices)
    kept = got.values != 0
    assert ((got.indices == a) & kept).sum(-1).eq(1).all(), "one entry, whether it fired or not"
    # Everything that reads codes reads the edited ones alike.
    dense = got.to_dense()
    assert torch.equal(got.columns([a, b]), dense[..., [a, b]])
    assert torch.equal(got.to_torch_sparse().to_dense().view(dense.shape), dense)
    torch.testing.assert_close(functional.decode(got, sae.W_dec), dense @ sae.W_dec)
    counts = got.latent_order().counts()
    assert torch.equal(counts.long(), (dense != 0).flatten(0, 1).sum(0))


def test_infinite_values_can_be_set(sae: TopKSAE) -> None:
    codes = SparseCodes.from_dense(torch.tensor([[0.0, torch.inf, 1.0]]), k=2)
    bank = EditBank(TopKSAE(4, 3, k=2), 1, 1)
    bank.write(0, [set_to(1, 2.0)])
    assert edit_codes(codes, bank).to_dense().tolist() == [[0.0, 2.0, 1.0]]


def test_means_are_those_of_dense_codes(codes: SparseCodes) -> None:
    want = codes.to_dense().mean(0)
    for given in (codes, ragged(codes)):
        torch.testing.assert_close(mean_codes(given), want)


def test_resampled_values_come_together(sae: TopKSAE, codes: SparseCodes) -> None:
    a, b = often(codes, 2)
    got = edit_codes(codes, bank_for(sae, [resample([a, b], codes)], 3), *places()[1:])
    pairs = {tuple(row) for row in codes.columns([a, b]).tolist()}
    assert {tuple(row) for row in got.columns([a, b]).tolist()} <= pairs


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: scale(-1, 2.0), "latent: expected whole numbers from 0 on, got -1"),
        (lambda: scale(True, 2.0), "latent: expected whole numbers from 0 on, got True"),
        (lambda: scale(1.5, 2.0), "latent: expected whole numbers from 0 on, got 1.5"),
        (lambda: scale("7", 2.0), "latent: expected whole numbers from 0 on, got '7'"),
        (lambda: scale(torch.ones(2), 2.0), "latent: expected whole numbers from 0 on, got tensor"),
        (lambda: scale(1, 2.0, when=[1, 2]), "when: expected one latent, got 2"),
        (lambda: scale(1, float("nan")), "expected numbers, got NaN"),
        (lambda: clamp(1, 2.0, 1.0), "clamp: expected low <= high, got 2.0 and 1.0"),
        (lambda: set_to(1, 1.0, rows=[-2]), r"row: expected whole numbers from 0 on, got \[-2\]"),
        (lambda: set_to(1, 1.0, at="later"), "at: expected all, prompt, generated or positions"),
        (lambda: set_to(1, 1.0, at=[]), r"or positions, got \[\]"),
        (lambda: set_to(1, 1.0, at=slice(0, 2)), r"or positions, got slice"),
        (lambda: steer([1.0, 2.0]), r"one direction \[D\] of floating point, got <class 'list'>"),
        (lambda: steer(torch.tensor([1.0, torch.nan])), "vector: expected finite numbers, got NaN"),
        (lambda: steer(torch.ones(2), float("inf")), "got NaN or infinity in inf"),
        (lambda: steer(torch.ones(2, 2)), r"one direction \[D\] of floating point, got"),
        (lambda: ablate(5, torch.ones(5)), r"\[F\] with F above 5, got \[5\]"),
    ],
)
def test_edits_that_mean_nothing(edit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit()


@pytest.mark.parametrize(
    "numbers",
    [torch.tensor([3, 5]), [torch.tensor(3), torch.tensor(5)], np.array([3, 5]), {3, 5}],
    ids=["tensor", "tensors", "array", "set"],
)
def test_numbers_of_any_library_name_latents_rows_and_positions(numbers: Any) -> None:
    edit = scale(numbers, 2.0, rows=numbers, at=numbers, when=next(iter(numbers)))
    want = scale([3, 5], 2.0, rows=[3, 5], at=[3, 5], when=3)
    assert (edit.latents, edit.rows, edit.spans, edit.when) == (
        want.latents,
        want.rows,
        want.spans,
        want.when,
    )


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([scale(F, 2.0)], f"latent: expected from 0 to {F - 1} .n_latents - 1., got {F}"),
        ([scale(1, 2.0, when=F)], f"latent: expected from 0 to {F - 1} .* got {F}"),
        ([steer(torch.ones(D + 1))], f"direction of width {D}, got {D + 1}"),
        ([scale(1, 2.0), set_to(1, 3.0)], "latent 1: expected one edit of it at a position"),
        ([scale(1, 2.0, at=3), ablate(1, at="generated")], "latent 1: expected one edit"),
        ([scale(range(7), 2.0)], "n_slots: expected at most 6 for a request, got 7"),
        ([keep_only(1), keep_only(2)], "keep_only: expected one in a row"),
    ],
)
def test_edits_that_do_not_fit_the_bank(sae: TopKSAE, edits: Any, message: str) -> None:
    bank = bank_for(sae, [], 1)
    with pytest.raises(ValueError, match=message):
        bank.write(0, edits)


def test_banks_that_fit_nothing(sae: TopKSAE) -> None:
    with pytest.raises(ValueError, match="expected an SAE, or the width"):
        EditBank(None, 1)
    with pytest.raises(ValueError, match="row: expected one of 0 to 1, got 2"):
        EditBank(sae, 2).write(2, [])
    with pytest.raises(ValueError, match="a bank made with keeps_only=True"):
        EditBank(sae, 1).write(0, [keep_only(1)])
    with pytest.raises(ValueError, match=r"hidden: expected \[tokens, 16\]"):
        EditBank(sae, 1)(torch.randn(2, D + 1), torch.zeros(2).long())
    with pytest.raises(ValueError, match="requests: expected one for each of 2 tokens, got 3"):
        EditBank(sae, 1)(torch.randn(2, D), torch.zeros(3).long())
    with pytest.raises(ValueError, match="expected none without an SAE, got 1"):
        EditBank(None, 1, width=D).write(0, [scale(1, 2.0)])
