"""The dense oracles: gradients by finite differences in every architecture, and in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_kernels.testing import DenseSpec, dense_loss
from tests.testing.dense_examples import grad, randoms

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

DTYPES = (torch.float64, torch.float32)
SMOOTH = {
    "topk": DenseSpec("topk", k=2, loss="fvu"),
    "topk-without-relu": DenseSpec("topk", k=4, relu=False),
    "topk-multi": DenseSpec("topk", k=1, multi_topk=True),
    "topk-ranked": DenseSpec("topk", k=2, rank_by_decoder_norm=True, norm="mixed", n_layers=2),
    "batchtopk": DenseSpec("batchtopk", k=1.6, loss="fvu", group_ends=(0, 2, 6)),
    "batchtopk-ranked": DenseSpec("batchtopk", k=1.6, rank_by_decoder_norm=True),
    "relu-l1": DenseSpec("relu", penalty="l1", coefficient=0.3),
    "relu-l1-crosscoder": DenseSpec(
        "relu", penalty="l1", coefficient=0.3, norm_weighted=True, norm="sum", n_layers=2
    ),
    "relu-lp": DenseSpec("relu", penalty="lp", p=0.6, coefficient=0.3, norm_weighted=True),
    "relu-tanh": DenseSpec(
        "relu", penalty="tanh", coefficient=0.3, norm_weighted=True, norm="mixed", n_layers=4
    ),
    "relu-matryoshka": DenseSpec("relu", group_ends=(2, 3, 6), group_weights=(1.0, 0.5, 2.0)),
    "gated": DenseSpec("gated", aux_stops_decoder=False, penalty="l1", coefficient=0.3),
    "gated-lp-matryoshka": DenseSpec(
        "gated",
        aux_stops_decoder=False,
        penalty="lp",
        p=0.4,
        coefficient=0.3,
        norm_weighted=True,
        group_ends=(3, 6),
    ),
    "jumprelu-tanh": DenseSpec(
        "jumprelu", bandwidth=0.1, penalty="tanh", coefficient=0.3, norm_weighted=True
    ),
}


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("spec", SMOOTH.values(), ids=SMOOTH.keys())
def test_gradients_by_finite_differences(spec: DenseSpec, skip: bool) -> None:
    # Around random points the kept set, the gates and the steps are constant. A threshold's
    # gradient is no derivative, so it stays fixed here.
    B, D, F = 4, 4, 6
    p, x, y = randoms(D, F), torch.randn(B, D).double(), torch.randn(B, D).double()
    fixed = {"threshold": torch.rand(F).double()} if spec.selection == "jumprelu" else {}
    if spec.selection == "gated":
        p |= {"r_mag": torch.randn(F).double() / 4, "b_mag": torch.randn(F).double()}
    if skip:
        p["W_skip"] = torch.randn(D, D).double()
    names = list(p)

    def losses(*values: Tensor) -> tuple[Tensor, ...]:
        result = dense_loss(spec, dict(zip(names, values[2:], strict=True)) | fixed, *values[:2])
        return result.loss, result.y_hat

    tensors = [value.requires_grad_() for value in (x, y, *p.values())]
    torch.autograd.gradcheck(losses, tensors)


def test_losses_of_a_target_that_is_the_input_move_with_it() -> None:
    x = torch.randn(4, 3).double().requires_grad_()
    p = randoms(3, 5)
    torch.autograd.gradcheck(lambda x: dense_loss(DenseSpec("relu", loss="fvu"), p, x).loss, [x])


EXACT = {
    "topk": DenseSpec("topk", k=2, multi_topk=True),
    "batchtopk": DenseSpec("batchtopk", k=1.5, group_ends=(0, 8)),
    "relu": DenseSpec("relu", group_ends=(1, 8), penalty="lp", p=2.0, coefficient=0.25),
    "jumprelu": DenseSpec("jumprelu", bandwidth=4.0, penalty="l0", coefficient=0.5),
    "gated": DenseSpec("gated", penalty="l1", coefficient=0.25),
}


@pytest.mark.parametrize("spec", EXACT.values(), ids=EXACT.keys())
def test_fp32_stays_fp32(spec: DenseSpec) -> None:
    # Small integers, and divisors that are powers of two: nothing is rounded in either dtype.
    p = {name: value.round() for name, value in randoms(4, 8).items()}
    vectors = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}.get(spec.selection, ())
    p |= {name: torch.zeros(8).double() for name in vectors}
    x = torch.randn(8, 4).double().round()
    exact, narrow = ({n: v.to(d, copy=True).requires_grad_() for n, v in p.items()} for d in DTYPES)
    results = [dense_loss(spec, q, x.to(d)) for q, d in zip((exact, narrow), DTYPES, strict=True)]
    for name, wide, value in zip(results[0]._fields, *results, strict=True):
        assert value.dtype == torch.float32, name
        assert torch.equal(value.double(), wide), name
    for result in results:
        result.loss.backward()
    for name, wide in exact.items():
        assert grad(narrow[name]).dtype == torch.float32
        assert torch.equal(grad(narrow[name]).double(), grad(wide)), name
