"""Properties of ragged codes over drawn problems: integers, so that results must be equal."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from drawn import Drawn, problems
from hypothesis import strategies as st

from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.select_batch_topk import select_batch_topk
from sae_kernels.primitives.select_threshold import select_threshold
from sae_kernels.testing import assert_bitwise, assert_within, oracles


def operands(drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W and b in the drawn layouts."""
    x = drawn.integers(drawn.B, drawn.D).to(drawn.dtype)
    x = x[:1].expand(drawn.B, -1) if drawn.expanded and drawn.B else drawn.place("x", x)
    W, b = drawn.integers(drawn.F, drawn.D), drawn.integers(drawn.F)
    return x, drawn.place("W", W.to(drawn.dtype)), b


def assert_codes(came: tuple[torch.Tensor, ...], h: torch.Tensor, kept: torch.Tensor) -> None:
    """Raises AssertionError unless the codes are the kept entries of h, exactly."""
    wanted = oracles.ragged(h, kept)
    assert_bitwise("offsets", came[2], wanted.offsets)
    assert_bitwise("latents", came[1], wanted.indices)
    assert_within("values", came[0], wanted.values, 0.0)


@hypothesis.given(drawn=problems(), shift=st.sampled_from([0, 1, 30, -10_000, 10_000]))
def test_select_threshold(drawn: Drawn, shift: int, enter: Any) -> None:
    enter(drawn)
    x, W, b = operands(drawn)
    bounds = drawn.integers(drawn.F) + shift
    h = oracles.scores(x, W, b).h
    came = select_threshold(x, W, b, bounds, backend="cpu")
    assert_codes(came, h, oracles.above(h, bounds))


STARTS = (None, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 10.0, 50.0, 1e30, torch.inf, torch.nan)


@hypothesis.given(
    drawn=problems(),
    start=st.sampled_from(STARTS),
    scaled=st.booleans(),
    share=st.sampled_from([0, 0.001, 0.01, 0.1, 0.3, 0.5, 1]),
)
def test_select_batch_topk(
    drawn: Drawn, start: float | None, scaled: bool, share: float, enter: Any
) -> None:
    enter(drawn)
    x, W, b = operands(drawn)
    scale = drawn.integers(drawn.F) if scaled else None
    exact = oracles.scores(x, W, b, scale)
    count = int(share * drawn.B * drawn.F)
    guess = None if start is None else torch.tensor(start)
    came = select_batch_topk(x, W, b, count, scale, guess, backend="cpu")
    assert_codes(came, exact.h, oracles.batch_topk(exact.h, exact.key, count))


@pytest.mark.full
@hypothesis.given(drawn=problems(), share=st.sampled_from([0.0, 0.02, 0.2, 1.0]))
def test_ragged_codes_through_the_decoder(drawn: Drawn, share: float, enter: Any) -> None:
    enter(drawn)
    kept = torch.rand(drawn.B, drawn.F) < share
    values, indices, offsets = oracles.ragged(drawn.integers(drawn.B, drawn.F), kept)
    W, target = drawn.integers(drawn.F, drawn.D), drawn.integers(drawn.B, drawn.D)
    weights, ends = None, None
    if drawn.seed % 2:
        ends = torch.tensor([0, drawn.F // 3, drawn.F], dtype=torch.int32)
        weights = drawn.integers(3)
    codes = values, indices, drawn.place("W", W.to(drawn.dtype))
    x_hat, _ = oracles.decode(*codes, None, ends, offsets)
    assert_within("x_hat", decode(*codes, None, ends, offsets, backend="cpu"), x_hat, 0.0)

    placed = drawn.place("grad", target)
    e, sse, grad = decode_residual(
        *codes, None, placed, False, ends, weights, offsets, backend="cpu"
    )
    difference = x_hat - target.double()
    difference = difference if ends is not None else difference[None]
    assert_within("sse", sse, difference.square().sum(-1).view(sse.shape), 0.0)
    assert_within("residual", e, oracles.suffix_sums(difference, weights).view(e.shape), 0.0)
    dvalues, _ = oracles.code_grad(e, *codes[1:], ends, offsets)
    assert_within("code_grad", grad, dvalues, 0.0)
    again = code_grad(e, *codes[1:], ends, offsets, backend="cpu")
    assert_bitwise("code_grad alone", again, grad)


@pytest.mark.slow
@hypothesis.settings(max_examples=1500)
@hypothesis.given(
    drawn=problems(),
    start=st.sampled_from(STARTS),
    scaled=st.booleans(),
    share=st.floats(0, 1),
)
def test_select_batch_topk_at_length(
    drawn: Drawn, start: float | None, scaled: bool, share: float, enter: Any
) -> None:
    test_select_batch_topk.hypothesis.inner_test(drawn, start, scaled, share, enter)
