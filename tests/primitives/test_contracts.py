"""What the operators say about bad arguments: what was expected, what came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels import SparseCodes, decode, encode_topk
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode as decode_rows
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.row_sqnorm import row_sqnorm
from sae_kernels.primitives.row_update import AdamRow, row_update
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.terms import Gradient, Term
from sae_kernels.primitives.transpose_codes import transpose_codes

if TYPE_CHECKING:
    from collections.abc import Callable

f32, f64, bf16, i32 = torch.float32, torch.float64, torch.bfloat16, torch.int32
t = torch.zeros
B, D, F, K = 3, 4, 6, 2
x, W, b = t(B, D), t(F, D), t(F)
values, indices = t(B, K), t(B, K, dtype=i32)
codes = SparseCodes(values, indices, F)
term = Term(t(F + 1, dtype=i32), t(6, dtype=i32), t(6, dtype=i32), t(6), t(B, D))
hyper = t(6, dtype=f64)
row = AdamRow(t(F, D), t(F, D), t(F, D))
low = t(F, D, dtype=torch.int16)


def select(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "k": K, "rank_scale": None, **changes}
    select_topk(*args.values())


def rows(**changes: Any) -> None:
    args = {"values": values, "indices": indices, "W": W, "b_dec": None, "ends": None, **changes}
    decode_rows(*args.values())


def residual(**changes: Any) -> None:
    args = {"values": values, "indices": indices, "W": W, "b_dec": None, "target": x, **changes}
    decode_residual(*args.values(), True)


def grads(**changes: Any) -> None:
    args = {"grad": x, "indices": indices, "W": W, "ends": None, **changes}
    code_grad(*args.values())


def transpose(**changes: Any) -> None:
    args = {"indices": indices, "values": values, "row_ids": None, "n_latents": F, **changes}
    transpose_codes(*args.values())


def weights(**changes: Any) -> None:
    row_grad([term._replace(**changes)], F, D)


def update(gradient: Gradient | None = None, hyper: torch.Tensor = hyper, **changes: Any) -> None:
    options = {name: changes.pop(name) for name in ("norm", "slices") if name in changes}
    row_update(row._replace(**changes), gradient or Gradient([term]), hyper, **options)


def encode(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "k": K, **changes}
    encode_topk(**args)


# The call, its error and the words that must be in it, with what came last.
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "encode-x-width": (lambda: encode(x=t(B, 5)), ValueError, r"x: .*\[\.\.\., 4\].* got \[3, 5\]"),
    "encode-x-0d": (lambda: encode(x=t(())), ValueError, r"x: .* got \[\]"),
    "encode-x-dtype": (lambda: encode(x=x.int()), TypeError, r"x: .* got int32"),
    "encode-W-dims": (lambda: encode(W_enc=t(D)), ValueError, r"W_enc: .*\[F, D\].* got \[4\]"),
    "encode-W-dtype": (lambda: encode(W_enc=W.long()), TypeError, r"W_enc: .* got int64"),
    "encode-b": (lambda: encode(b_enc=t(D)), ValueError, r"b_enc: .*\[6\].* got \[4\]"),
    "encode-b-dec": (lambda: encode(b_dec=t(F)), ValueError, r"b_dec: .*\[4\].* got \[6\]"),
    "encode-scale": (lambda: encode(rank_scale=t(D)), ValueError, r"rank_scale: .*\[6\].*\[4\]"),
    "encode-compute": (lambda: encode(compute_dtype=i32), TypeError, r"compute_dtype: .*int32"),
    "encode-float8": (
        lambda: encode(compute_dtype=torch.float8_e5m2),
        TypeError,
        "compute_dtype: .*float8_e5m2",
    ),
    "encode-k-zero": (lambda: encode(k=0), ValueError, r"1 <= k <= n_latents = 6, got 0"),
    "encode-k-large": (lambda: encode(k=7), ValueError, r"1 <= k <= n_latents = 6, got 7"),
    "encode-k-float": (lambda: encode(k=2.0), TypeError, r"k: expected an int, got float"),
    "encode-k-bool": (lambda: encode(k=True), TypeError, r"k: expected an int, got bool"),
    "encode-device": (
        lambda: encode(b_dec=t(D, device="meta")),
        ValueError,
        r"one device, .*b_dec on meta",
    ),
    "encode-no-input": (
        lambda: encode(x=t(B, 0), W_enc=t(F, 0)),
        ValueError,
        r"D >= 1.* got shape \[3, 0\]",
    ),
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
    "select-x": (lambda: select(x=t(D)), ValueError, r"x: .*\[B, D\].* got \[4\]"),
    "select-W": (lambda: select(W=t(F, 5)), ValueError, r"W: .*\[F, 4\].* got \[6, 5\]"),
    "select-W-dtype": (lambda: select(W=W.to(bf16)), TypeError, "W: .*float32, got bfloat16"),
    "select-b-dtype": (lambda: select(b=b.double()), TypeError, r"b: .*float32, got float64"),
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
    "term-offsets": (
        lambda: weights(offsets=t(F, dtype=i32)),
        ValueError,
        r"terms\[0\]\.offsets: .*\[7\].*\[6\]",
    ),
    "term-coef": (lambda: weights(coef=t(5)), ValueError, r"terms\[0\]\.coef: .*\[6\].* got \[5\]"),
    "term-coef-2d": (lambda: weights(coef=values), ValueError, r"\.coef: .*\[6\].* got \[3, 2\]"),
    "term-rows": (lambda: weights(rows=t(6)), TypeError, r"terms\[0\]\.rows: .*int32, got float32"),
    "term-source": (lambda: weights(source=t(B, 5)), ValueError, r"source: .*\[R, 4\].*\[3, 5\]"),
    "term-device": (
        lambda: weights(offsets=t(F + 1, dtype=i32, device="meta")),
        ValueError,
        "offsets on meta",
    ),
    "update-m": (lambda: update(m=t(F, 5)), ValueError, r"m: .*\[6, 4\].* got \[6, 5\]"),
    "update-v": (lambda: update(v=t(F, D, dtype=f64)), TypeError, r"v: .*float32.*, got float64"),
    "update-mixed": (lambda: update(v=t(F, D, dtype=bf16)), TypeError, "such an m: .*got bfloat16"),
    "update-no-halves": (lambda: update(param=low), ValueError, "copy: .*high halves .*got None"),
    "update-halves": (
        lambda: update(param=low, copy=t(F, D).half()),
        TypeError,
        "copy beside an int16 param: expected bfloat16, got float16",
    ),
    "update-copy": (lambda: update(copy=t(F, D)), TypeError, r"copy: .*got float32"),
    "update-strides": (lambda: update(m=t(D, F).T), ValueError, "m: expected a contiguous tensor"),
    "update-hyper": (lambda: update(hyper=t(4, dtype=f64)), ValueError, r"hyper: .*\[6\].*\[4\]"),
    "update-hyper-dtype": (lambda: update(hyper=t(6)), TypeError, "hyper: .*float64, got float32"),
    "update-device": (
        lambda: update(hyper=hyper.to("meta")),
        ValueError,
        "one device, .*hyper on meta",
    ),
    "update-norm": (lambda: update(norm="l2"), ValueError, r"norm: .*at_most_one, got 'l2'"),
    "update-slices": (lambda: update(slices=3), ValueError, r"slices: .*width 4, got 3"),
    "update-row-coef": (
        lambda: update(Gradient(row_coef=t(D))),
        ValueError,
        r"row_coef: .*\[6\].* got \[4\]",
    ),
    "update-half-a-block": (
        lambda: update(Gradient(dense=x)),
        ValueError,
        "dense_latents: expected both or neither",
    ),
    "update-block": (
        lambda: update(Gradient(dense=x, dense_latents=t(2, dtype=i32))),
        ValueError,
        r"dense_latents: .*\[3\].* got \[2\]",
    ),
    "sqnorm-halves": (
        lambda: row_sqnorm(low, Gradient([term])),
        ValueError,
        "high: .*high halves .*got None",
    ),
    "sqnorm-high": (
        lambda: row_sqnorm(t(F, D), Gradient([term]), high=t(F, D, dtype=bf16)),
        TypeError,
        "param with high halves: expected int16, got float32",
    ),
    "sqnorm-norm": (
        lambda: row_sqnorm(t(F, D), Gradient([term]), norm="unit_"),
        ValueError,
        "got 'unit_'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused_with_what_was_expected_and_what_came(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value), "one line, please"


def test_a_copy_beside_fp64_is_refused() -> None:
    wide = AdamRow(*(t(F, D, dtype=f64) for _ in range(3)), t(F, D, dtype=bf16))
    with pytest.raises(TypeError, match="param with a copy: expected float32, got float64"):
        row_update(wide, Gradient(), hyper)


def test_the_good_arguments_are_accepted() -> None:
    # Otherwise the table above could pass for the wrong reason.
    for call in (select, rows, residual, grads, transpose, weights, update, encode):
        call()
    decode(codes, W, t(D))
