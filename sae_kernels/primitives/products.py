"""Products in Triton, as every kernel that multiplies on the matrix units does them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    """``acc + a b``, sums in fp32 and fp32 operands unrounded.

    WIDEN: Triton's interpreter multiplies the bit patterns of bf16.
    """
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(x, W, rows, columns, D, DEPTH: tl.constexpr, WIDEN: tl.constexpr):
    """``<x[rows], W[columns]>`` for any rows of two matrices of width D; all must exist."""
    inputs = tl.arange(0, DEPTH)
    x_rows = x + rows.to(tl.int64)[:, None] * D
    W_rows = W + columns.to(tl.int64)[:, None] * D
    h = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, D, DEPTH):
        part = start + inputs[None, :]
        tokens = tl.load(x_rows + part, mask=part < D, other=0.0)
        latents = tl.load(W_rows + part, mask=part < D, other=0.0)
        h = dot(tokens, latents.T, h, WIDEN)
    return h
