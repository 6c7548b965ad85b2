"""Triton's interpreter with products that round alike at every place of a tile, as on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np


def round_alike() -> None:
    """Sums the products of ``tl.dot`` in fp64 and rounds once.

    The interpreter multiplies with NumPy's BLAS, which on some processors (AMD Zen) rounds a row
    differently at another place of a tile. A tensor core does not, and that rows do not depend on
    their batch is what the tests are about.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    with_blas = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if any(operand.data.dtype != np.float32 for operand in (a, b, d)):
            return with_blas(self, a, b, d, *options)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are asked for
            product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
