"""SparseCodes: conversions, latent order, several sets at once."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

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
    joint = row_grad([order.term(coef, source)], F, 3, backend=either_backend)
    single = [
        row_grad(
            [codes.latent_order(backend=either_backend).term(codes.values, source)],
            F,
            3,
            backend=either_backend,
        )
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
    joint = row_grad([order.term(coef, source)], F, 5, backend=either_backend)
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
