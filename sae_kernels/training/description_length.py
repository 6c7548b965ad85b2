"""Description length of activations coded by an SAE (after arXiv 2410.11179)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes

PRECISION = 0.01


class DescriptionLength(NamedTuple):
    """Bits per token to send activations by their codes, and without an SAE.

    Attributes:
        bits_codes: for the codes.
        bits_residual: for the residual of their reconstruction.
        bits_without_sae: for the activations themselves, to the same precision.
    """

    bits_codes: float
    bits_residual: float
    bits_without_sae: float

    @property
    def bits_per_token(self) -> float:
        """``bits_codes + bits_residual``."""
        return self.bits_codes + self.bits_residual


class DescriptionLengthSums:
    """Accumulates the moments that the description length depends on, in one pass over tokens.

    The sender conveys every activation with a squared error of N in each coordinate, which is
    ``precision`` times the mean variance of a coordinate: first the codes, coarsely, then the
    residual of their reconstruction. A number of variance v is sent with noise of variance n in

        ``R(v, n) = 1/2 log2(1 + v / n)``

    bits. That is what a quantiser with dither takes at most, whatever the distribution (a Gaussian
    is the dearest), up to 0.25 bits for one that treats each number by itself.

    - codes: ``sum_j H(p_j) + p_j R(s_j^2 |w_j|^2, M + N)``. Latent j fires on the part p_j of the
      tokens, with values of variance s_j^2 there; H is the entropy of a coin, w_j the decoder row.
      M is the mean variance of a coordinate of the residual. A value's noise is worth M + N along
      its row: the sum of all bits is least there, as a finer value costs more than it saves below
      (to first order in L0 / D).
    - residual: ``sum_d R(r_d + (M + N) L0 / D, N)`` with r_d the variance of its coordinate d; the
      second term is the noise of the codes, spread evenly.
    - without the SAE: ``sum_d R(v_d, N)`` with v_d the variance of the activations' coordinate d.

    It assumes that latents are sent one by one, as are tokens and coordinates, and that the
    receiver has the SAE, p, s and all means and variances, which many tokens pay for together. It
    follows the minimum description length view of Ayonrinde, Pearce and Sharkey (arXiv
    2410.11179), who send every value with a fixed number of bits and leave the residual out.

    Nothing changes when activations are scaled or moved together with the SAE, when a latent's
    values are divided by what its decoder row is multiplied with, or when latents are permuted.
    Another basis of the activations changes the residual's bits. Memory is three numbers a latent
    and four a coordinate: moments stand for histograms, which would take F times their bins.

    Args:
        d_in: width of the activations, D.
        n_latents: number of latents, F.
        device: device of the tokens.

    Example:
        >>> from sae_kernels.codes import SparseCodes
        >>> sums = DescriptionLengthSums(d_in=2, n_latents=2)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> sums.update(x, x, SparseCodes.from_dense(x, k=1))
        >>> bits = sums.result(decoder_norms=torch.ones(2))
        >>> bits.bits_codes  # each fires half the time, with one value
        2.0
    """

    def __init__(self, d_in: int, n_latents: int, device: torch.device | str | None = None) -> None:
        self.activations = _Moments(d_in, device)
        self.residual = _Moments(d_in, device)
        self.values = _Moments(n_latents, device)
        self.n_tokens = 0

    @torch.no_grad()
    def update(self, x: torch.Tensor, x_hat: torch.Tensor, codes: SparseCodes) -> None:
        """Adds tokens: activations and reconstructions [n, D], with their codes.

        An entry whose value is 0 did not fire.
        """
        self.n_tokens += x.shape[0]
        self.activations.add_rows(x)
        self.residual.add_rows(x - x_hat)
        self.values.add_entries(codes.values.flatten(), codes.indices.flatten().long())

    def result(
        self, decoder_norms: torch.Tensor, precision: float = PRECISION
    ) -> DescriptionLength:
        """The description length of all tokens so far; NaN where the activations do not vary.

        Args:
            decoder_norms: [F], norms of the decoder rows.
            precision: allowed squared error, as a fraction of the activations' variance.

        Raises:
            ValueError: a precision that is not positive, or no tokens.
        """
        if not precision > 0:
            raise ValueError(f"precision: expected a positive number, got {precision!r}")
        if not self.n_tokens:
            raise ValueError("expected at least one token, got none")
        variance, residual = self.activations.variance(), self.residual.variance()
        noise = precision * variance.mean()
        coarse = residual.mean() + noise
        density = self.values.counts / self.n_tokens
        spread = self.values.variance() * decoder_norms.to(density).square()
        codes = _coin(density) + density * _rate(spread, coarse)
        added = coarse * density.sum() / len(residual)
        return DescriptionLength(
            bits_codes=float(codes.sum()),
            bits_residual=float(_rate(residual + added, noise).sum()),
            bits_without_sae=float(_rate(variance, noise).sum()),
        )


class _Moments:
    """Counts, sums and sums of squares per variable, in fp64."""

    def __init__(self, size: int, device: torch.device | str | None) -> None:
        self.counts, self.total, self.square = torch.zeros(
            3, size, dtype=torch.float64, device=device
        )

    def add_rows(self, rows: torch.Tensor) -> None:
        rows = rows.double()
        self.counts += rows.shape[0]
        self.total += rows.sum(0)
        self.square += rows.square().sum(0)

    def add_entries(self, values: torch.Tensor, indices: torch.Tensor) -> None:
        values = values.double()
        self.counts.index_add_(0, indices, (values != 0).double())
        self.total.index_add_(0, indices, values)
        self.square.index_add_(0, indices, values.square())

    def variance(self) -> torch.Tensor:
        counts = self.counts.clamp_min(1)
        # The difference of two sums may come out below 0 where there is no variance.
        result: torch.Tensor = ((self.square - self.total.square() / counts) / counts).clamp_min(0)
        return result


def _rate(variance: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return torch.log1p(variance / noise) / (2 * math.log(2))


def _coin(p: torch.Tensor) -> torch.Tensor:
    """Entropy in bits of an event of probability p."""
    result: torch.Tensor = torch.special.entr(torch.stack([p, 1 - p])).sum(0) / math.log(2)
    return result
