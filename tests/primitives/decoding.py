"""What the tests of the decoder's primitives share: codes, groups and what must come out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import refusals
import torch

from sae_kernels import gpu
from sae_kernels.primitives.checks import accumulator
from sae_kernels.testing import assert_within, gamma, oracles, rounding

if TYPE_CHECKING:
    from collections.abc import Sequence


# The others run where the host cannot look at the indices without waiting for the device.
CHECKED_ON_THE_HOST = ("reference", "cpu")


class Codes(NamedTuple):
    """Arguments of decode, with a few dropped entries (value 0)."""

    values: torch.Tensor
    indices: torch.Tensor
    W: torch.Tensor
    b_dec: torch.Tensor


class Form(NamedTuple):
    """The arguments of decode_residual that give codes and reconstructions another form."""

    group_ends: torch.Tensor | None = None
    group_weights: torch.Tensor | None = None
    offsets: torch.Tensor | None = None


def needs(
    dtype: torch.dtype, backend: str, primitive: str = "decode", arguments: Sequence[Any] = ()
) -> None:
    """Skips what a backend has no kernel for, and in the interpreter fp16."""
    if gpu.interpreted() and dtype == torch.float16:
        pytest.skip("Triton's interpreter is slow, and fp16 differs from bf16 in the loads alone")
    refusals.needs(primitive, dtype, backend, arguments)


def make(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Codes:
    """Random codes with distinct latents, in the accumulator dtype of ``dtype``."""
    B, K, D, F = shape
    high = accumulator(dtype)
    values = torch.randn(B, K, dtype=high) * (torch.rand(B, K) > 0.1)
    indices = torch.rand(B, F).argsort(dim=1)[:, :K].to(torch.int32)
    return Codes(values, indices, torch.randn(F, D).to(dtype), torch.randn(D, dtype=high))


def make_ragged(
    counts: Sequence[int], D: int, F: int, dtype: torch.dtype
) -> tuple[Codes, torch.Tensor]:
    """The same with so many entries a token, in latent order; and their offsets."""
    every = make((len(counts), F, D, F), dtype)
    kept = torch.rand(len(counts), F).argsort(dim=1) < torch.tensor(counts).reshape(-1, 1)
    values, indices, offsets = oracles.ragged(every.values, kept)
    return every._replace(values=values, indices=indices), offsets


def group_ends(groups: int | None, n_latents: int) -> torch.Tensor | None:
    """Ends of that many groups, the first possibly empty."""
    if groups is None:
        return None
    ends = [n_latents * g // groups for g in range(1, groups + 1)]
    return torch.tensor(ends, dtype=torch.int32)


def most_entries(codes: Codes, offsets: torch.Tensor | None) -> int:
    """Of any token."""
    if offsets is None:
        return codes.indices.shape[1]
    return max(offsets.diff().tolist(), default=0)


def assert_residual(
    results: tuple[torch.Tensor, ...],
    codes: Codes,
    target: torch.Tensor,
    drop_zeros: bool,
    form: Form | None = None,
) -> None:
    """Raises AssertionError unless decode_residual's results are within budget of the oracle."""
    e, sse, grad = results
    dtype, D = codes.W.dtype, codes.W.shape[1]
    ends, weights, offsets = form or Form()
    x_hat, magnitude = oracles.decode(*codes, ends, offsets)
    difference = x_hat - target.double()
    off = rounding(most_entries(codes, offsets) + 2, magnitude + target.double().abs(), dtype)
    # The sums below start from a difference that is off by so much.
    own = rounding(D + 1, difference.square().sum(-1), dtype)
    budget = ((2 * difference.abs() + off) * off).sum(-1) + own
    assert_within("sse", sse, difference.square().sum(-1), budget)
    exact, de = difference, off
    if ends is not None:
        exact = oracles.suffix_sums(difference, weights)
        absolute = None if weights is None else weights.abs()
        de = oracles.suffix_sums(off, absolute)
        terms = oracles.suffix_sums(difference.abs() + off, absolute)
        de = de + rounding(2 * ends.numel(), terms, dtype)  # a product and a sum for each group
    assert_within("residual", e, exact, de)
    expected, terms = oracles.code_grad(exact, codes.indices, codes.W, ends, offsets)
    carried = oracles.code_grad(de, codes.indices, codes.W.abs(), ends, offsets)[0]
    if drop_zeros:
        expected = torch.where(codes.values == 0, 0.0, expected)
        assert not bool(grad[codes.values == 0].any()), "a dropped entry has a gradient"
    budget = carried * (1 + gamma(D, dtype)) + rounding(D, terms, dtype)
    assert_within("code_grad", grad, expected, budget)
