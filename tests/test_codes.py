"""SparseCodes: conversions, latent order, several sets at once."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import SparseCodes
from sae_kernels.codes import joint_latent_order
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.testing import assert_bitwise, oracles

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")
F = 17


@pytest.mark.parametrize("leading", [(5,), (), (0,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_largest_entries_of_a_dense_tensor(
    leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    dense = torch.randn(*leading, F).to(dtype)
    codes = SparseCodes.from_dense(dense, 6)
    top = dense.to(codes.values.dtype).topk(6)
    assert codes.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert codes.indices.dtype == torch.int32
    assert (codes.k, codes.n_latents) == (6, F)
    assert_bitwise("values", codes.values, top.values)
    assert_bitwise(
        "selected", dense.to(codes.values.dtype).gather(-1, codes.indices.long()), codes.values
    )


def test_from_dense_keeps_the_contract_of_the_selection() -> None:
    # Infinities stay where they are (no product with an identity matrix makes NaN of them), ties
    # go to the lower latent, -0 equals and becomes +0, NaN comes first.
    inf, nan = torch.inf, torch.nan
    dense = torch.tensor([[0.0, inf, -0.0, -inf], [1.0, nan, 1.0, nan], [-1.0, -0.0, 0.0, -inf]])
    codes = SparseCodes.from_dense(dense, 3)
    assert codes.indices.tolist() == [[1, 0, 2], [1, 3, 0], [1, 2, 0]]
    assert codes.values.nan_to_num(nan=9.0).tolist() == [
        [pytest.approx(torch.finfo(torch.float32).max), 0.0, 0.0],
        [9.0, 9.0, 1.0],
        [0.0, 0.0, -1.0],
    ]
    assert not bool((codes.values.signbit() & (codes.values == 0)).any())


@pytest.mark.parametrize("k", [0, F + 1, -1])
def test_from_dense_refuses_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k: expected 1 <= k <= n_latents = {F}, got {k}"):
        SparseCodes.from_dense(torch.zeros(2, F), k)


def test_gradients_pass_through_both_conversions() -> None:
    dense = torch.randn(4, F, dtype=torch.float64)
    dense[1] -= 9  # what is kept of it is negative
    codes = SparseCodes.from_dense(dense.requires_grad_(), 3)
    again = codes.to_dense()
    kept = again != 0
    assert kept.sum(1).tolist() == [3] * 4
    assert_bitwise("values", again[kept], dense[kept])
    again.square().sum().backward()
    assert dense.grad is not None
    assert_bitwise("gradient", dense.grad, torch.where(kept, 2 * dense.detach(), 0.0))


@pytest.mark.parametrize("leading", [(6,), (2, 3), (0,), ()], ids=str)
def test_dense_and_torch_sparse_agree(leading: tuple[int, ...]) -> None:
    codes = SparseCodes.from_dense(torch.randn(*leading, F), 4)
    dense = codes.to_dense()
    assert dense.shape == (*leading, F)
    assert_bitwise("sparse", codes.to_torch_sparse().to_dense(), dense.reshape(-1, F))


def test_latent_order_of_any_leading_shape(either_backend: str) -> None:
    codes = SparseCodes.from_dense(torch.randn(2, 3, F), 4)
    order = codes.latent_order(backend=either_backend)
    fired = (codes.to_dense().reshape(-1, F) != 0).sum(0)
    assert order.counts().tolist() == fired.tolist()
    for latent in range(F):
        part = slice(int(order.offsets[latent]), int(order.offsets[latent + 1]))
        entries = order.entries[part].long()
        assert codes.indices.flatten()[entries].tolist() == [latent] * entries.numel()
        assert order.rows[part].tolist() == (entries // 4).tolist()
        assert entries.tolist() == sorted(entries.tolist())


def test_every_group_of_latents_has_rows_of_its_own(either_backend: str) -> None:
    indices = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32)
    codes = SparseCodes(torch.ones(2, 2), indices, 4)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)  # latents 0 and 1, none, 2 and 3
    order = codes.latent_order(backend=either_backend).by_group(indices, ends, 2)
    assert order.entries.tolist() == [0, 3, 1, 2]
    assert order.rows.tolist() == [0, 1, 2 * 2 + 0, 2 * 2 + 1]


def test_a_joint_order_adds_up_like_the_single_ones(either_backend: str) -> None:
    # Multi-TopK and AuxK: sets of different k over the same tokens, one pass over the weights.
    dense = (torch.randn(8, F) * 4).round()
    sets = [SparseCodes.from_dense(dense, k) for k in (2, 5, 1)]
    source = (torch.randn(8, 3) * 4).round()
    order = joint_latent_order(sets, backend=either_backend)
    coef = torch.cat([codes.values.flatten() for codes in sets])
    joint = row_grad([order.term(coef, source)], F, 3, backend=either_backend)[0]
    single = [
        row_grad(
            [codes.latent_order(backend=either_backend).term(codes.values, source)],
            F,
            3,
            backend=either_backend,
        )[0]
        for codes in sets
    ]
    assert bool(joint.any())
    assert torch.equal(joint, torch.stack(single).sum(0))  # small integers: exact
    expected = sum(
        oracles.dense_codes(codes.values, codes.indices, F).T @ source.double() for codes in sets
    )
    assert torch.equal(joint.double(), expected)


def ragged(leading: tuple[int, ...] | None = None, share: float = 0.3) -> SparseCodes:
    """A share of the entries of a random matrix; the second token has none."""
    tokens = 6 if leading is None else math.prod(leading)
    h = torch.randn(tokens, F)
    kept = torch.rand(tokens, F) < share
    kept[1:2] = False
    values, indices, offsets = oracles.ragged(h, kept)
    return SparseCodes(values, indices, F, offsets, leading)


RAGGED_LEADING = [None, (6,), (2, 3), (), (0,), (2, 0), (1, 2, 2)]
leadings = pytest.mark.parametrize("leading", RAGGED_LEADING, ids=str)


@leadings
def test_ragged_codes_dense_and_sparse(leading: tuple[int, ...] | None) -> None:
    codes = ragged(leading)
    shape = (6,) if leading is None else leading
    assert codes.batch_shape == shape
    assert codes.tokens.dtype == torch.int32
    assert codes.offsets is not None
    expected = oracles.dense_codes(codes.values, codes.indices, F, codes.offsets)
    dense = codes.to_dense()
    assert dense.shape == (*shape, F)
    assert_bitwise("dense", dense.reshape(-1, F).double(), expected)
    assert_bitwise("sparse", codes.to_torch_sparse().to_dense(), dense.reshape(-1, F))
    flat = codes.flat()
    assert flat.leading is None
    assert flat.batch_shape == (math.prod(shape),)
    assert_bitwise("flat", flat.to_dense(), dense.reshape(-1, F))


def test_gradients_pass_through_the_dense_form_of_ragged_codes() -> None:
    codes = ragged((2, 3))
    leaf = codes.values.clone().requires_grad_()
    weights = torch.randn(2, 3, F)
    (weights * codes.with_values(leaf).to_dense()).sum().backward()
    assert leaf.grad is not None
    expected = weights.reshape(-1, F)[codes.tokens.long(), codes.indices.long()]
    assert_bitwise("gradient", leaf.grad, expected)


def test_with_values_keeps_the_places() -> None:
    codes = ragged((2, 3))
    other = codes.with_values(codes.values * 2)
    assert other.indices is codes.indices
    assert other.offsets is codes.offsets
    assert other.batch_shape == (2, 3)
    assert_bitwise("dense", other.to_dense(), codes.to_dense() * 2)
    last = codes.with_values(codes.values, F - 1 - codes.indices)
    assert_bitwise("mirrored", last.to_dense(), codes.to_dense().flip(-1))


def test_ragged_codes_have_no_k() -> None:
    with pytest.raises(ValueError, match="k: expected codes of k entries a token, got ragged"):
        _ = ragged().k


def test_tokens_of_codes_of_k_entries() -> None:
    codes = SparseCodes.from_dense(torch.randn(2, 3, F), 4)
    assert codes.batch_shape == (2, 3)
    assert codes.tokens.tolist() == [[token] * 4 for token in range(6)]
    assert codes.flat().indices.shape == (6, 4)
    assert codes.flat().batch_shape == (6,)


@leadings
@pytest.mark.parametrize("drop_zeros", [True, False], ids=["drop-zeros", "keep-zeros"])
def test_latent_order_of_ragged_codes(
    leading: tuple[int, ...] | None, drop_zeros: bool, either_backend: str
) -> None:
    codes = ragged(leading)
    codes.values[::4], codes.values[1::7] = 0.0, torch.nan
    order = codes.latent_order(drop_zeros=drop_zeros, backend=either_backend)
    wanted: list[list[tuple[int, int]]] = [[] for _ in range(F)]
    columns = (codes.indices.tolist(), codes.tokens.tolist(), codes.values.tolist())
    for entry, (latent, token, value) in enumerate(zip(*columns, strict=True)):
        if value != 0 or not drop_zeros:
            wanted[latent].append((entry, token))
    assert order.counts().tolist() == [len(pairs) for pairs in wanted]
    used = int(order.offsets[-1])
    came = list(zip(order.entries[:used].tolist(), order.rows[:used].tolist(), strict=True))
    assert came == [pair for pairs in wanted for pair in pairs]


def test_a_joint_order_of_ragged_and_other_codes(either_backend: str) -> None:
    dense = (torch.randn(6, F) * 4).round()
    sets = [ragged(), SparseCodes.from_dense(dense, 3), ragged((2, 3), 0.9), ragged(share=0.0)]
    sets = [codes.with_values((codes.values * 4).round()) for codes in sets]
    source = (torch.randn(6, 5) * 4).round()
    order = joint_latent_order(sets, backend=either_backend)
    coef = torch.cat([codes.values.flatten() for codes in sets])
    joint = row_grad([order.term(coef, source)], F, 5, backend=either_backend)[0]
    expected = sum(codes.to_dense().reshape(-1, F).T @ source for codes in sets)
    assert torch.equal(joint, expected)  # small integers: exact
    everything = joint_latent_order(sets, drop_zeros=False, backend=either_backend)
    assert int(everything.offsets[-1]) == coef.numel()
    assert int(order.offsets[-1]) == int((coef != 0).sum())


def test_padding_with_zeros_makes_no_hot_latent(either_backend: str) -> None:
    codes = SparseCodes(torch.zeros(50, 4), torch.zeros(50, 4, dtype=torch.int32), F)
    assert not bool(codes.latent_order(backend=either_backend).counts().any())


def test_copies_and_pickles() -> None:
    for codes in (SparseCodes.from_dense(torch.randn(3, F), 4), ragged(), ragged((2, 3))):
        for other in (copy.deepcopy(codes), pickle.loads(pickle.dumps(codes))):
            assert other is not codes
            assert (other.n_latents, other.leading) == (F, codes.leading)
            assert_bitwise("values", other.values, codes.values)
            assert_bitwise("indices", other.indices, codes.indices)
            assert (other.offsets is None) == (codes.offsets is None)
            if codes.offsets is not None:
                assert_bitwise("offsets", other.offsets, codes.offsets)


def test_codes_are_compared_by_identity() -> None:
    # Comparing field by field would ask a tensor for its truth value.
    codes = SparseCodes.from_dense(torch.randn(3, F), 4)
    assert codes == codes
    assert codes != copy.deepcopy(codes)
    assert len({codes, copy.deepcopy(codes)}) == 2


def some_codes(form: str, leading: tuple[int, ...], dtype: torch.dtype) -> SparseCodes:
    """Codes of either form with dropped entries and NaN among them."""
    if form == "ragged":
        codes = ragged(leading)
        codes = codes.with_values(codes.values.to(dtype))
    else:
        codes = SparseCodes.from_dense(torch.randn(*leading, F, dtype=dtype), 5)
    values = codes.values.flatten().clone()
    values[::4], values[1::7] = 0.0, torch.nan
    return codes.with_values(values.view(codes.values.shape))


LEADING = [(6,), (2, 3), (), (0,), (2, 0)]
forms = pytest.mark.parametrize("form", ["k", "ragged"])


@forms
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "latents", [[3], [], [16, 0, 3], [5, 5, 2, 5], list(range(F))], ids=lambda c: f"{len(c)}"
)
def test_columns_are_those_of_the_dense_tensor(
    form: str, leading: tuple[int, ...], dtype: torch.dtype, latents: list[int]
) -> None:
    codes = some_codes(form, leading, dtype)
    wanted = torch.tensor(latents, dtype=torch.int64)
    expected = codes.to_dense()[..., wanted]
    for form_of_list in (latents, tuple(latents), wanted, wanted.int()):
        columns = codes.columns(form_of_list)
        assert columns.shape == (*leading, len(latents))
        assert columns.dtype == dtype
        assert_bitwise("columns", columns, expected)


@forms
def test_gradients_of_columns_are_those_of_the_dense_tensor(form: str) -> None:
    codes = some_codes(form, (2, 3), torch.float64)
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    latents = [2, 9, 9, 0]
    grads = []
    for pick in (
        lambda codes: codes.columns(latents),
        lambda codes: codes.to_dense()[..., latents],
    ):
        leaf = codes.values.clone().requires_grad_()
        (weights * pick(codes.with_values(leaf))).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert bool(grads[0].any())
    assert_bitwise("gradient", *grads)


def test_columns_never_make_the_dense_tensor() -> None:
    codes = SparseCodes.from_dense(torch.randn(64, 4096), 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        codes.columns([1, 2, 3])
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 64 * 4096, "bytes; the dense tensor has four times as many"


@pytest.mark.parametrize(
    ("latents", "error", "message"),
    [
        ([0, -1], ValueError, f"latents: expected numbers from 0 to {F - 1} .*, got -1"),
        ([F], ValueError, f"latents: expected numbers from 0 to {F - 1} .*, got {F}"),
        (torch.tensor([3, 99]), ValueError, "got 99"),
        ([0.5], TypeError, "expected a list of whole numbers, got torch.float32"),
        (torch.zeros(F, dtype=torch.bool), TypeError, r"mask.nonzero\(\).flatten\(\)"),
        ([[1, 2]], TypeError, r"got torch.int64 of shape \[1, 2\]"),
        (3, TypeError, r"of shape \[\]"),
    ],
)
def test_columns_that_are_not_there(latents: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ragged().columns(latents)


@forms
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scipy_holds_what_is_not_dropped(
    form: str, leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    pytest.importorskip("scipy", reason="scipy is not a dependency")
    codes = some_codes(form, leading, dtype)
    array = codes.to_scipy()
    dense = codes.to_dense().reshape(-1, F)
    assert array.shape == dense.shape
    assert torch.equal(
        torch.tensor(array.toarray()).nan_to_num(nan=-99.0), dense.nan_to_num(nan=-99.0)
    )
    assert array.nnz == int((codes.values != 0).sum())
    assert array.has_canonical_format
    codes.values.requires_grad_()
    assert codes.to_scipy().nnz == array.nnz, "values that have a gradient"


def test_scipy_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r"^to_scipy: expected SciPy.*pip install scipy$"):
        ragged().to_scipy()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_columns_and_scipy_agree_with_the_dense_tensor(data: st.DataObject) -> None:
    n_latents = data.draw(st.integers(1, 12))
    kept = data.draw(st.lists(st.sets(st.integers(0, n_latents - 1)), max_size=6))
    values = data.draw(
        st.lists(
            st.sampled_from([0.0, -1.5, 2.0, torch.inf]),
            min_size=sum(map(len, kept)),
            max_size=sum(map(len, kept)),
        )
    )
    indices = [latent for row in kept for latent in sorted(row)]
    offsets = torch.tensor([0, *map(len, kept)]).cumsum(0).int()
    codes = SparseCodes(
        torch.tensor(values, dtype=torch.float32), torch.tensor(indices).int(), n_latents, offsets
    )
    latents = data.draw(st.lists(st.integers(0, n_latents - 1), max_size=8))
    dense = codes.to_dense()
    assert torch.equal(codes.columns(latents), dense[:, torch.tensor(latents).long()])
    if importlib.util.find_spec("scipy"):  # not a dependency
        assert torch.equal(torch.tensor(codes.to_scipy().toarray()), dense)
