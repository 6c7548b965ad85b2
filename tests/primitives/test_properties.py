"""Properties over drawn shapes, strides, k, dtypes, ISA variants and thread counts.

Inputs are small integers, so that every sum is exact and results must be equal, not close.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from drawn import Drawn, problems

from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.terms import Term
from sae_kernels.primitives.transpose_codes import transpose_codes
from sae_kernels.testing import assert_bitwise, assert_within, oracles


@hypothesis.given(drawn=problems())
def test_select_topk(drawn: Drawn, enter: Any) -> None:
    enter(drawn)
    x = drawn.integers(drawn.B, drawn.D).to(drawn.dtype)
    x = x[:1].expand(drawn.B, -1) if drawn.expanded and drawn.B else drawn.place("x", x)
    W, b = drawn.integers(drawn.F, drawn.D), drawn.integers(drawn.F)
    W = drawn.place("W", W.to(drawn.dtype))
    values, indices = select_topk(x, W, b, drawn.k, None, backend="cpu")
    exact = oracles.scores(x, W, b)
    assert_bitwise("indices", indices.long(), oracles.selection(exact.key, drawn.k))
    assert_within("values", values, exact.h.gather(1, indices.long()), 0.0)


@hypothesis.given(drawn=problems())
def test_decode_and_its_gradients(drawn: Drawn, enter: Any) -> None:
    enter(drawn)
    indices = torch.rand(drawn.B, drawn.F).argsort(1)[:, : drawn.k].to(torch.int32)
    values, grad = drawn.integers(drawn.B, drawn.k), drawn.integers(drawn.B, drawn.D)
    W = drawn.integers(drawn.F, drawn.D)
    ends = torch.tensor([drawn.F // 3, drawn.F], dtype=torch.int32) if drawn.seed % 2 else None
    args = (drawn.place("indices", indices), drawn.place("W", W.to(drawn.dtype)))
    out = decode(drawn.place("values", values), *args, None, ends, backend="cpu")
    assert_within("x_hat", out, oracles.decode(values, indices, W, None, ends)[0], 0.0)
    dvalues = code_grad(drawn.place("grad", grad), *args, None, backend="cpu")
    assert_within("dvalues", dvalues, oracles.code_grad(grad, indices, W)[0], 0.0)


@hypothesis.given(drawn=problems())
def test_latent_order_and_weight_gradient(drawn: Drawn, enter: Any) -> None:
    enter(drawn)
    indices = torch.rand(drawn.B, drawn.F).argsort(1)[:, : drawn.k].to(torch.int32)
    values = drawn.integers(drawn.B, drawn.k)
    source = drawn.integers(drawn.B, drawn.D).to(drawn.dtype)
    ours, reference = (
        transpose_codes(
            drawn.place("indices", indices),
            drawn.place("values", values),
            None,
            drawn.F,
            backend=backend,
        )
        for backend in ("cpu", "reference")
    )
    for name, a, e in zip(("offsets", "entries", "rows"), ours, reference, strict=True):
        assert_bitwise(name, a, e)
    term = Term(*ours, values.flatten(), drawn.place("grad", source))
    dW = row_grad([term], drawn.F, drawn.D, backend="cpu")[0]
    dense = oracles.dense_codes(values, indices, drawn.F)
    assert_within("dW", dW, dense.T @ source.double(), 0.0)


@pytest.mark.slow
@hypothesis.settings(max_examples=1500)
@hypothesis.given(drawn=problems())
def test_select_topk_at_length(drawn: Drawn, enter: Any) -> None:
    test_select_topk.hypothesis.inner_test(drawn, enter)
