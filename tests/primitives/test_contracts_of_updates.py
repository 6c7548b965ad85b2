"""Bad arguments of row gradients, updates and AuxK: what was expected, what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sae_kernels.primitives.row_sqnorm import row_sqnorm
from sae_kernels.primitives.row_update import AdamMatrix, row_update
from sae_kernels.primitives.terms import Gradient
from tests.primitives.good_calls import (
    B,
    D,
    F,
    W,
    assert_refused,
    bf16,
    dead,
    f64,
    hyper,
    i32,
    low,
    t,
    term,
    update,
    values,
    weights,
    x,
)

if TYPE_CHECKING:
    from tests.primitives.good_calls import Refusal

BAD: dict[str, Refusal] = {
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
    assert_refused(*BAD[name])


def test_a_copy_beside_fp64_is_refused() -> None:
    wide = AdamMatrix(*(t(F, D, dtype=f64) for _ in range(3)), t(F, D, dtype=bf16))
    with pytest.raises(TypeError, match="param with a copy: expected float32, got float64"):
        row_update(wide, Gradient(), hyper)
