"""Good arguments are accepted, or the tables of bad ones could pass for the wrong reason."""

from __future__ import annotations

from sae_kernels import decode
from sae_kernels.primitives.terms import Gradient
from tests.primitives.good_calls import (
    B,
    D,
    F,
    W,
    above,
    batch,
    codes,
    dead,
    encode,
    ends,
    grads,
    jumprelu,
    largest,
    offsets,
    ragged,
    residual,
    route,
    routed,
    rows,
    select,
    t,
    threshold,
    transpose,
    update,
    weights,
)


def test_the_good_arguments_are_accepted() -> None:
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
