"""Hard inputs for encoder kernels: ties, NaN, infinities, odd shapes.

A case is a shape and a kind of input; :meth:`Case.inputs` builds the tensors. In the exact kinds
every product and partial sum is a small integer (or a special value), so any order of summation
gives the same bits and results can be compared for equality, ties included.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

EXACT_KINDS = ("integer", "equal", "ties", "nan", "inf", "signed_zeros")


class Inputs(NamedTuple):
    """Operands of the encoder: x [B, D], W [F, D], b [F] in the accumulator dtype or None."""

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, a dtype and a kind of input.

    Attributes:
        name: unique in the table; the test's id.
        B, D, F, K: tokens, d_in, n_latents, kept per token.
        kind: "normal", "zipf", "negative", "denormal" or one of `EXACT_KINDS`.
        dtype: of the operands.
        bias: whether there is a bias.
    """

    name: str
    B: int
    D: int
    F: int
    K: int
    kind: str = "normal"
    dtype: torch.dtype = torch.float32
    bias: bool = True

    @property
    def exact(self) -> bool:
        """Whether results do not depend on the order of summation."""
        return self.kind in EXACT_KINDS

    def cast(self, dtype: torch.dtype) -> Case:
        """This case with operands of another dtype."""
        return dataclasses.replace(self, dtype=dtype)

    def inputs(self, seed: int = 0) -> Inputs:
        """The operands, on torch's default device; a seed gives the same ones on all devices."""
        device = torch.get_default_device()
        with torch.device("cpu"):
            x, W, b = _build(self, torch.Generator().manual_seed(seed))
        high = torch.float64 if self.dtype == torch.float64 else torch.float32
        bias = b.to(device, high) if self.bias else None
        return Inputs(x.to(device, self.dtype), W.to(device, self.dtype), bias)


def _build(case: Case, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, D, F = case.B, case.D, case.F

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def integer(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=g).double()

    if case.kind in ("normal", "negative", "denormal", "zipf"):
        x, W, b = normal(B, D), normal(F, D) / D**0.5, normal(F) / 8
        if case.kind == "negative":  # every score is negative: ReLU drops all that is kept
            return x.abs(), -W.abs(), -b.abs()
        if case.kind == "denormal":  # products around and below the smallest normal number
            tiny = torch.finfo(case.dtype).smallest_normal
            return x * tiny, W, b * tiny
        if case.kind == "zipf":  # few latents are in nearly every token
            popularity = 1 / torch.arange(1, F + 1, dtype=torch.float64)
            active = torch.rand(B, F, generator=g, dtype=torch.float64) < popularity
            x = active.double() @ W + 0.05 * x
        return x, W, b
    x, W, b = integer(B, D), integer(F, D), integer(F)
    if case.kind == "equal":  # every score of a row is the same: the first K latents win
        return x, W[:1].expand(F, D).clone(), b[:1].expand(F).clone()
    if case.kind == "ties":  # each row of W many times over, so the cut goes through ties
        distinct = torch.arange(F) % max(1, F // 7)
        return x, W[distinct], b[distinct]
    if case.kind == "signed_zeros":  # every score is a zero of either sign
        zero = torch.where(x < 0, -0.0, 0.0)
        return zero, W, torch.full_like(b, -0.0)
    if case.kind == "nan":  # in some tokens, some latents and some biases
        x[::5, -1], W[::9, 0], b[::11] = torch.nan, torch.nan, torch.nan
    if case.kind == "inf":  # whole columns of +inf and -inf scores; opposite ones meet as NaN
        x[:, 0] = x[:, 0].abs() + 1
        W[::4, 0], W[1::4, 0], W[2::12, 0] = torch.inf, -torch.inf, torch.inf
        x[::6, -1] = -torch.inf
    return x, W, b


CASES = (
    Case("plain", 33, 48, 97, 8),
    Case("no-bias", 17, 40, 64, 5, bias=False),
    Case("one-token", 1, 32, 130, 7),
    Case("no-token", 0, 32, 64, 4),
    Case("one-input", 9, 1, 50, 3),
    Case("one-latent", 6, 20, 1, 1),
    Case("k-one", 40, 24, 200, 1),
    Case("k-all", 18, 20, 67, 67),
    Case("k-nearly-all", 7, 19, 150, 149),
    Case("k-over-512", 5, 16, 1100, 600),
    Case("odd-width-prime-latents", 21, 37, 211, 13),
    Case("wide-not-a-power-of-two", 19, 2304, 100, 10),
    Case("many-latents", 12, 33, 3001, 50),
    Case("many-tokens", 611, 24, 140, 6),
    Case("tile-edges", 64, 64, 129, 16),
    Case("zipf", 130, 32, 257, 12, "zipf"),
    Case("all-negative", 20, 24, 90, 9, "negative"),
    Case("denormal", 20, 24, 90, 9, "denormal"),
    Case("integer", 50, 33, 500, 20, "integer"),
    Case("integer-wide", 17, 770, 300, 32, "integer"),
    Case("integer-k-all", 9, 15, 131, 131, "integer"),
    Case("integer-many-latents", 6, 8, 4500, 100, "integer"),
    Case("all-equal", 19, 12, 700, 33, "equal"),
    Case("ties-at-the-cut", 35, 10, 700, 45, "ties"),
    Case("signed-zeros", 10, 9, 80, 6, "signed_zeros"),
    Case("nan", 22, 14, 160, 20, "nan"),
    Case("nan-k-one", 22, 14, 160, 1, "nan"),
    Case("inf", 25, 14, 150, 45, "inf"),
)
