"""What the operators say about bad arguments: what was expected, what came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels import SparseCodes, decode, encode_topk
from sae_kernels.functional import encode_batch_topk, encode_jumprelu, encode_threshold
from sae_kernels.primitives.auxk import auxk
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode as decode_rows
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.route_top1 import route_top1
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.row_sqnorm import row_sqnorm
from sae_kernels.primitives.row_update import AdamMatrix, row_update
from sae_kernels.primitives.select_batch_topk import select_batch_topk
from sae_kernels.primitives.select_threshold import select_threshold
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.select_topk_routed import select_topk_routed
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
offsets = torch.tensor([0, 2, 2, 6], dtype=i32)
ragged = {"values": t(6), "indices": t(6, dtype=i32), "offsets": offsets}
ends = torch.tensor([2, F], dtype=i32)
tokens, starts = torch.tensor([1, 0, 2], dtype=i32), torch.tensor([0, 1, 3, 3], dtype=i32)
term = Term(t(F + 1, dtype=i32), t(6, dtype=i32), t(6, dtype=i32), t(6), t(B, D))
hyper = t(6, dtype=f64)
row = AdamMatrix(t(F, D), t(F, D), t(F, D))
low = t(F, D, dtype=torch.int16)


def select(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "k": K, "rank_scale": None, **changes}
    select_topk(*args.values())


def above(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "bounds": b, **changes}
    select_threshold(*args.values())


def largest(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "count": K, "rank_scale": None, "start": None, **changes}
    select_batch_topk(*args.values())


def route(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, **changes}
    route_top1(*args.values())


def routed(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "k": K, "tokens": tokens, "starts": starts, **changes}
    select_topk_routed(*args.values())


def rows(**changes: Any) -> None:
    args = {"values": values, "indices": indices, "W": W, "b_dec": None, "ends": None}
    decode_rows(*({**args, "offsets": None, **changes}).values())


def residual(**changes: Any) -> None:
    args = {"values": values, "indices": indices, "W": W, "b_dec": None, "target": x, "drop": True}
    forms = {"ends": None, "weights": None, "offsets": None}
    decode_residual(*({**args, **forms, **changes}).values())


def grads(**changes: Any) -> None:
    args = {"grad": x, "indices": indices, "W": W, "ends": None, "offsets": None, **changes}
    code_grad(*args.values())


def dead(**changes: Any) -> None:
    args = {"x": x, "residual": t(B, 5), "W_enc": W, "b_enc": b, "W_dec": t(F, 5)}
    latents = {"latents": t(2, dtype=i32), "count": t((), dtype=i32), "k": K, "alpha": 1.0}
    auxk(*({**args, **latents, **changes}).values())


def transpose(**changes: Any) -> None:
    args = {"indices": indices, "values": values, "row_ids": None, "n_latents": F, **changes}
    transpose_codes(*args.values())


def weights(W: Any = None, n_terms: int = 1, **changes: Any) -> None:
    row_grad([term._replace(**changes)] * n_terms, F, D, W=W)


def update(gradient: Gradient | None = None, hyper: torch.Tensor = hyper, **changes: Any) -> None:
    options = {name: changes.pop(name) for name in ("norm", "slices") if name in changes}
    row_update(row._replace(**changes), gradient or Gradient([term]), hyper, **options)


def encode(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "k": K, **changes}
    encode_topk(**args)


def threshold(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "threshold": 0.5, **changes}
    encode_threshold(**args)


def jumprelu(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "threshold": b, **changes}
    encode_jumprelu(**args)


def batch(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "k": 1.5, **changes}
    encode_batch_topk(**args)


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
    "threshold-shape": (
        lambda: threshold(threshold=t(D)),
        ValueError,
        r"threshold: .*\[6\] \(one per latent, or one for all\), got \[4\]",
    ),
    "threshold-x": (lambda: threshold(x=t(B, 5)), ValueError, r"x: .*\[\.\.\., 4\].* got \[3, 5\]"),
    "jumprelu-shape": (
        lambda: jumprelu(threshold=t(D)),
        ValueError,
        r"threshold: .*\[6\] \(one per latent\), got \[4\]",
    ),
    "batch-k-zero": (lambda: batch(k=0), ValueError, r"0 < k <= n_latents = 6, got 0"),
    "batch-k-large": (lambda: batch(k=6.5), ValueError, r"0 < k <= n_latents = 6, got 6\.5"),
    "batch-k-nan": (lambda: batch(k=torch.nan), ValueError, r"0 < k <= n_latents = 6, got nan"),
    "batch-k-bool": (lambda: batch(k=True), ValueError, r"0 < k <= n_latents = 6, got True"),
    "batch-k-words": (lambda: batch(k="2"), ValueError, r"0 < k <= n_latents = 6, got '2'"),
    "batch-start": (lambda: batch(start=t(1)), ValueError, r"start: .*\[\].* got \[1\]"),
    "batch-scale": (lambda: batch(rank_scale=t(D)), ValueError, r"rank_scale: .*\[6\].*\[4\]"),
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
    "above-x": (lambda: above(x=t(D)), ValueError, r"x: .*\[B, D\].* got \[4\]"),
    "above-W": (lambda: above(W=t(F, 5)), ValueError, r"W: .*\[F, 4\].* got \[6, 5\]"),
    "above-b": (lambda: above(b=t(D)), ValueError, r"b: .*\[6\].* got \[4\]"),
    "above-bounds": (lambda: above(bounds=t(D)), ValueError, r"bounds: .*\[6\].* got \[4\]"),
    "above-dtype": (
        lambda: above(bounds=b.double()),
        TypeError,
        r"bounds: .*float32, got float64",
    ),
    "above-device": (
        lambda: above(bounds=b.to("meta")),
        ValueError,
        "one device, .*bounds on meta",
    ),
    "above-no-input": (lambda: above(x=t(B, 0), W=t(F, 0)), ValueError, r"D >= 1.*\[3, 0\]"),
    "largest-W": (lambda: largest(W=t(F, 5)), ValueError, r"W: .*\[F, 4\].* got \[6, 5\]"),
    "largest-count": (lambda: largest(count=-1), ValueError, "count: expected at least 0, got -1"),
    "largest-scale": (
        lambda: largest(rank_scale=b.double()),
        TypeError,
        r"rank_scale: .*float32, got float64",
    ),
    "largest-start": (lambda: largest(start=t(F)), ValueError, r"start: .*\[\].* got \[6\]"),
    "route-x": (lambda: route(x=t(D)), ValueError, r"x: .*\[B, D\].* got \[4\]"),
    "route-W": (lambda: route(W=t(F, 5)), ValueError, r"W: .*\[F, 4\].* got \[6, 5\]"),
    "route-W-dtype": (lambda: route(W=W.to(bf16)), TypeError, "W: .*float32, got bfloat16"),
    "route-b": (lambda: route(b=t(D)), ValueError, r"b: .*\[6\].* got \[4\]"),
    "route-no-expert": (
        lambda: route(W=t(0, D), b=None),
        ValueError,
        r"W: .*at least one expert.* got shape \[0, 4\]",
    ),
    "route-device": (lambda: route(b=b.to("meta")), ValueError, "one device, .*b on meta"),
    "routed-W": (lambda: routed(W=t(F, 5)), ValueError, r"W: .*\[F, 4\].* got \[6, 5\]"),
    "routed-b-dtype": (lambda: routed(b=b.double()), TypeError, "b: .*float32, got float64"),
    "routed-tokens": (
        lambda: routed(tokens=tokens[:2]),
        ValueError,
        r"tokens: .*\[3\] \(every token once, by expert\), got \[2\]",
    ),
    "routed-tokens-int64": (
        lambda: routed(tokens=tokens.long()),
        TypeError,
        "tokens: .*int32, got int64",
    ),
    "routed-starts-2d": (
        lambda: routed(starts=starts[None]),
        ValueError,
        r"starts: .*\[E \+ 1\].* got \[1, 4\]",
    ),
    "routed-starts-float": (
        lambda: routed(starts=starts.float()),
        TypeError,
        "starts: .*int32, got float32",
    ),
    "routed-no-expert": (
        lambda: routed(starts=starts[:1]),
        ValueError,
        "starts: .*divides n_latents = 6, got 0",
    ),
    "routed-four-experts": (
        lambda: routed(starts=t(5, dtype=i32)),
        ValueError,
        "starts: .*divides n_latents = 6, got 4",
    ),
    "routed-k-zero": (lambda: routed(k=0), ValueError, "1 <= k <= 2, .*3 experts, got 0"),
    "routed-k-large": (lambda: routed(k=3), ValueError, "1 <= k <= 2, .*3 experts, got 3"),
    "routed-device": (
        lambda: routed(tokens=tokens.to("meta")),
        ValueError,
        "one device, .*tokens on meta",
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
    "term-offsets": (
        lambda: weights(offsets=t(F, dtype=i32)),
        ValueError,
        r"terms\[0\]\.offsets: .*\[7\].*\[6\]",
    ),
    "term-coef": (lambda: weights(coef=t(5)), ValueError, r"terms\[0\]\.coef: .*\[6\].* got \[5\]"),
    "term-coef-2d": (lambda: weights(coef=values), ValueError, r"\.coef: .*\[6\].* got \[3, 2\]"),
    "term-rows": (lambda: weights(rows=t(6)), TypeError, r"terms\[0\]\.rows: .*int32, got float32"),
    "term-source": (lambda: weights(source=t(B, 5)), ValueError, r"source: .*\[R, 4\].*\[3, 5\]"),
    "products-of-terms": (lambda: weights(W, 2), ValueError, "W: .*one term.*got 2"),
    "products-W": (lambda: weights(t(F, 5)), ValueError, r"W: .*\[6, 4\].* got \[6, 5\]"),
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
    "update-row-coef-parts": (
        lambda: update(Gradient(row_coef=t(F, 3))),
        ValueError,
        "row_coef: expected a divisor of the width 4 as parts of a row, got 3",
    ),
    "update-row-coef-no-parts": (
        lambda: update(Gradient(row_coef=t(F, 0))),
        ValueError,
        "row_coef: expected a divisor of the width 4 as parts of a row, got 0",
    ),
    "update-row-coef-rows": (
        lambda: update(Gradient(row_coef=t(5, 2))),
        ValueError,
        r"row_coef: .*\[6, 2\].* got \[5, 2\]",
    ),
    "update-row-coef-0d": (
        lambda: update(Gradient(row_coef=t(()))),
        ValueError,
        r"row_coef: .*\[6\].* got \[\]",
    ),
    "update-row-coef-3d": (
        lambda: update(Gradient(row_coef=t(F, 2, 1))),
        ValueError,
        r"row_coef: .*\[6, 2\].* got \[6, 2, 1\]",
    ),
    "update-row-coef-dtype": (
        lambda: update(Gradient(row_coef=t(F, 2, dtype=f64))),
        TypeError,
        "row_coef: .*float32, got float64",
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
    "dead-rows": (
        lambda: dead(residual=t(2, 5)),
        ValueError,
        r"residual: .*\[3, D_out\].* \[2, 5\]",
    ),
    "dead-width": (lambda: dead(W_dec=W), ValueError, r"W_dec: .*\[6, 5\].* got \[6, 4\]"),
    "dead-W-enc": (lambda: dead(W_enc=t(F, 5)), ValueError, r"W_enc: .*\[F, 4\].* got \[6, 5\]"),
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
    wide = AdamMatrix(*(t(F, D, dtype=f64) for _ in range(3)), t(F, D, dtype=bf16))
    with pytest.raises(TypeError, match="param with a copy: expected float32, got float64"):
        row_update(wide, Gradient(), hyper)


def test_the_good_arguments_are_accepted() -> None:
    # Otherwise the table above could pass for the wrong reason.
    for call in (route, routed):
        call()
    for call in (select, above, largest, rows, residual, grads, transpose, weights, update, dead):
        call()
    for call in (encode, threshold, jumprelu, batch):
        call()
    for call in (rows, residual):
        call(**ragged)
        call(**ragged, ends=ends)
    residual(ends=ends, weights=t(2))
    grads(grad=t(2, B, D), indices=ragged["indices"], ends=ends, offsets=offsets)
    update(Gradient(row_coef=t(F, 2)))
    decode(codes, W, t(D))
