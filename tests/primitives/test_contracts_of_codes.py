"""Bad arguments of decoders, code gradients and transpositions: what was expected, what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels import SparseCodes, decode
from tests.primitives.good_calls import (
    B,
    D,
    F,
    K,
    W,
    assert_refused,
    b,
    bf16,
    codes,
    ends,
    f64,
    grads,
    i32,
    indices,
    offsets,
    ragged,
    residual,
    rows,
    t,
    transpose,
    values,
    x,
)

if TYPE_CHECKING:
    from tests.primitives.good_calls import Refusal

BAD: dict[str, Refusal] = {
    "decode-W": (lambda: decode(codes, t(5, D)), ValueError, r"W_dec: .*\[6, D\].* got \[5, 4\]"),
    "decode-b": (lambda: decode(codes, W, b), ValueError, r"b_dec: .*\[4\].* got \[6\]"),
    "decode-int64": (
        lambda: decode(SparseCodes(values, indices.long(), F), W),
        TypeError,
        "indices: .* int64",
    ),
    "decode-lengths": (
        lambda: decode(SparseCodes(t(B, K, 2), indices, F), W),
        ValueError,
        r"indices: .*\[6, 2\]",
    ),
    "decode-device": (
        lambda: decode(codes, W.to("meta")),
        ValueError,
        r"one device, got values on cpu.* on meta",
    ),
    "decode-values": (lambda: rows(values=t(B, 3)), ValueError, r"indices: .*\[3, 3\].*\[3, 2\]"),
    "decode-v-dtype": (lambda: rows(values=values.half()), TypeError, "values: .* got float16"),
    "decode-ends-2d": (
        lambda: rows(ends=t(1, 1, dtype=i32)),
        ValueError,
        r"group_ends: .*\[G\].* got \[1, 1\]",
    ),
    "decode-ends-int64": (
        lambda: rows(ends=torch.tensor([F])),
        TypeError,
        r"group_ends: .*int32, got int64",
    ),
    "ragged-2d": (
        lambda: rows(offsets=offsets),
        ValueError,
        r"values: .*\[N\] \(.*with offsets\), got \[3, 2\]",
    ),
    "ragged-no-offsets": (
        lambda: rows(values=t(6), indices=ragged["indices"]),
        ValueError,
        r"values: .*\[B, K\].* got \[6\]",
    ),
    "ragged-offsets-2d": (
        lambda: rows(**{**ragged, "offsets": t(2, 2, dtype=i32)}),
        ValueError,
        r"offsets: .*\[B \+ 1\].* got \[2, 2\]",
    ),
    "ragged-offsets-int64": (
        lambda: rows(**{**ragged, "offsets": offsets.long()}),
        TypeError,
        "offsets: .*int32, got int64",
    ),
    "ragged-offsets-none": (
        lambda: rows(**{**ragged, "offsets": t(0, dtype=i32)}),
        ValueError,
        r"offsets: .*\[B \+ 1\], got \[0\]; no token still has one",
    ),
    "ragged-device": (
        lambda: rows(**{**ragged, "offsets": offsets.to("meta")}),
        ValueError,
        "one device, .*offsets on meta",
    ),
    "ragged-target": (
        lambda: residual(**ragged, target=t(2, D)),
        ValueError,
        r"target: .*\[3, 4\].* got \[2, 4\]",
    ),
    "ragged-grad": (
        lambda: grads(grad=t(2, D), indices=ragged["indices"], offsets=offsets),
        ValueError,
        r"grad: .*\[3, 4\].* got \[2, 4\]",
    ),
    "ragged-grad-groups": (
        lambda: grads(indices=ragged["indices"], ends=ends, offsets=offsets),
        ValueError,
        r"grad: .*\[2, 3, 4\].* got \[3, 4\]",
    ),
    "weights-alone": (
        lambda: residual(weights=t(2)),
        ValueError,
        "group_weights: expected group_ends with them, got none",
    ),
    "weights-shape": (
        lambda: residual(ends=ends, weights=t(3)),
        ValueError,
        r"group_weights: .*\[2\].* got \[3\]",
    ),
    "weights-dtype": (
        lambda: residual(ends=ends, weights=t(2, dtype=f64)),
        TypeError,
        "group_weights: .*float32, got float64",
    ),
    "residual-ends": (
        lambda: residual(ends=ends.long()),
        TypeError,
        r"group_ends: .*int32, got int64",
    ),
    "residual-target": (lambda: residual(target=t(B, 5)), ValueError, r"target: .*\[3, 4\].*5"),
    "residual-dtype": (lambda: residual(target=x.to(bf16)), TypeError, "target: .* got bfloat16"),
    "grad-shape": (lambda: grads(grad=t(2, D)), ValueError, r"grad: .*\[3, 4\].* got \[2, 4\]"),
    "grad-groups": (
        lambda: grads(ends=t(2, dtype=i32)),
        ValueError,
        r"grad: .*\[2, 3, 4\].* got \[3, 4\]",
    ),
    "transpose-dims": (
        lambda: transpose(indices=t(6, dtype=i32), values=None),
        ValueError,
        r"\[B, K\].* got \[6\]",
    ),
    "transpose-values": (lambda: transpose(values=t(B)), ValueError, r"values: .*\[3, 2\].*\[3\]"),
    "transpose-half": (lambda: transpose(values=values.half()), TypeError, "values: .* float16"),
    "transpose-rows": (
        lambda: transpose(row_ids=t(B, dtype=i32)),
        ValueError,
        r"row_ids: .*\[3, 2\].* got \[3\]",
    ),
    "transpose-none": (
        lambda: transpose(n_latents=0),
        ValueError,
        "n_latents: .*at least 1, got 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused_with_what_was_expected_and_what_came(name: str) -> None:
    assert_refused(*BAD[name])
