"""The certificates of the encoders' screens (docs/numerics.md), in fp64 and step by step.

A product of rows in 8 bits, on GPUs in bf16, and the lengths of what rounding them lost bound every
score that the fp32 encoder computes. The kernels do the same in fp32, with allowances for their own
rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST = 127
_UNIT = 2.0**-24  # unit roundoff of fp32


class Narrow(NamedTuple):
    """Rows in few bits: ``rows`` is about ``scale * q``.

    Attributes:
        q: integers of -127 to 127, or numbers of bf16, in fp64, as the rows.
        scale: [n, 1], of a row.
        narrow: [n, 1], the length of ``scale * q``.
        error: [n, 1], the length of what is left.
    """

    q: torch.Tensor
    scale: torch.Tensor
    narrow: torch.Tensor
    error: torch.Tensor


class Bounds(NamedTuple):
    """Scores by narrow rows, [B, F] in fp64, and how far those of the fp32 encoder may be off."""

    score: torch.Tensor
    error: torch.Tensor


def pair_sums(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the magnitudes that vpmaddubsw's 16 bits hold at a time.

    Returns:
        Of two neighbours, [n, pairs], and of the four pairs of sixteen elements whose products are
        added up, [n, 2 * sixteens]: every other pair.
    """
    padded = torch.nn.functional.pad(rows.abs(), (0, -rows.shape[1] % 16))
    pairs = padded.unflatten(1, (-1, 4, 2, 2)).sum(4)  # [n, sixteens, quads, pairs]
    return pairs.flatten(1), pairs.sum(2).flatten(1)


def narrow(rows: torch.Tensor, pairs: bool = False) -> Narrow:
    """Rounds every row to 8 bits, its largest element to 127.

    With ``pairs`` the step is as large as sums of products in 16 bits need it: no two neighbours of
    q are above 128 together, nor the eight elements of four pairs above 258.

    Example:
        >>> narrow(torch.tensor([[254.0, 3.0, -100.0]])).q.tolist()
        [[127.0, 2.0, -50.0]]
        >>> narrow(torch.tensor([[254.0, 254.0, -100.0]]), pairs=True).q.tolist()
        [[64.0, 64.0, -25.0]]
    """
    rows = rows.double()
    most = rows.abs().amax(1, keepdim=True)
    if pairs:
        two, eight = (sums.amax(1, keepdim=True) for sums in pair_sums(rows))
        most = torch.maximum(two, eight / 2)
    scale = torch.where(most == 0, 1.0, most / _LARGEST)
    q = (rows / scale).round()
    length = (scale * q).norm(dim=1, keepdim=True)
    return Narrow(q, scale, length, (rows - scale * q).norm(dim=1, keepdim=True))


def in_bf16(rows: torch.Tensor) -> Narrow:
    """Rounds every element to bf16.

    Example:
        >>> in_bf16(torch.tensor([[1.0, 1.001, 1.01]])).q.tolist()
        [[1.0, 1.0, 1.0078125]]
    """
    q, rows = rows.bfloat16().double(), rows.double()
    one = torch.ones_like(rows[:, :1])
    return Narrow(q, one, *(t.norm(dim=1, keepdim=True) for t in (q, rows - q)))


def score_bounds(
    x: torch.Tensor,
    W: torch.Tensor,
    rounded: Callable[[torch.Tensor], Narrow] = narrow,
    tokens: Callable[[torch.Tensor], Narrow] | None = None,
) -> Bounds:
    """Bounds on the scores ``x W^T`` in fp32, of finite rows of normal numbers.

    ``rounded`` makes the narrow rows, ``tokens`` those of x where they are made otherwise.

    ``|s - x_q w_q| <= |x| |w - w_q| + |x - x_q| |w_q| + gamma_D |x| |w|``: Cauchy and Schwarz for
    the two differences, and the rounding of a sum of D products in fp32.
    """
    token, latent = (tokens or rounded)(x), rounded(W)
    score = (token.q * token.scale) @ (latent.q * latent.scale).T
    nu = x.shape[1] * _UNIT
    length, other = x.double().norm(dim=1, keepdim=True), W.double().norm(dim=1, keepdim=True)
    lost = latent.error + nu / (1 - nu) * other
    return Bounds(score, length @ lost.T + token.error @ latent.narrow.T)
