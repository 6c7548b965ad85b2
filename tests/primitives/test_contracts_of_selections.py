"""Bad arguments of encoders, selections and routers: what was expected, what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.primitives.good_calls import (
    B,
    D,
    F,
    W,
    above,
    assert_refused,
    b,
    batch,
    bf16,
    encode,
    i32,
    jumprelu,
    largest,
    route,
    routed,
    select,
    starts,
    t,
    threshold,
    tokens,
    x,
)

if TYPE_CHECKING:
    from tests.primitives.good_calls import Refusal

BAD: dict[str, Refusal] = {
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
    "select-x": (lambda: select(x=t(D)), ValueError, r"x: .*\[B, D\].* got \[4\]"),
    "select-W": (lambda: select(W=t(F, 5)), ValueError, r"W: .*\[F, 4\].* got \[6, 5\]"),
    "select-W-dtype": (lambda: select(W=W.to(bf16)), TypeError, "W: .*float32, got bfloat16"),
    "select-floor": (
        lambda: select(narrow=None, by_magnitude=False, floor=t(D)),
        ValueError,
        r"floor: .*\[3\] \(one per token\), got \[4\]",
    ),
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
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused_with_what_was_expected_and_what_came(name: str) -> None:
    assert_refused(*BAD[name])
