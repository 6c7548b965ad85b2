"""SparseCodes: conversions, latent order, several sets at once."""

from __future__ import annotations

import copy
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
    dense = torch.randn(4, F, dtype=torch.float64, requires_grad=True)
    codes = SparseCodes.from_dense(dense, 3)
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


def test_padding_with_zeros_makes_no_hot_latent(either_backend: str) -> None:
    codes = SparseCodes(torch.zeros(50, 4), torch.zeros(50, 4, dtype=torch.int32), F)
    assert not bool(codes.latent_order(backend=either_backend).counts().any())


def test_copies_and_pickles() -> None:
    codes = SparseCodes.from_dense(torch.randn(3, F), 4)
    for other in (copy.deepcopy(codes), pickle.loads(pickle.dumps(codes))):
        assert other is not codes
        assert other.n_latents == F
        assert_bitwise("values", other.values, codes.values)
        assert_bitwise("indices", other.indices, codes.indices)


def test_codes_are_compared_by_identity() -> None:
    # Comparing field by field would ask a tensor for its truth value.
    codes = SparseCodes.from_dense(torch.randn(3, F), 4)
    assert codes == codes
    assert codes != copy.deepcopy(codes)
    assert len({codes, copy.deepcopy(codes)}) == 2
