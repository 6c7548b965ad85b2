"""The shrinkage fix: a scale per latent, fitted once an L1-trained SAE is done.

An L1 penalty makes all codes smaller than reconstruction wants them (Wright and Sharkey 2024,
"Addressing feature suppression in SAEs"). With the latents' choice and directions kept, the best
scale of each is a least-squares problem, solved here by conjugate gradients over the kept entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels import functional
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.row_grad import row_grad

if TYPE_CHECKING:
    from sae_kernels.codes import LatentOrder, SparseCodes
    from sae_kernels.nn.base import SparseAutoencoder

_LEAST = 0.1  # of a scale: one that is not positive would turn a latent off


class _Codes:
    """The linear map from scales to reconstructions, and its transpose."""

    def __init__(self, sae: SparseAutoencoder, codes: SparseCodes) -> None:
        self.sae, self.codes = sae, codes
        self.order: LatentOrder = codes.latent_order(backend=sae.backend)

    def reconstruct(self, scales: torch.Tensor) -> torch.Tensor:
        values = self.codes.values * scales[self.codes.indices.long()]
        return functional.decode(
            self.codes.with_values(values), self.sae.W_dec, backend=self.sae.backend
        )

    def transposed(self, residual: torch.Tensor) -> torch.Tensor:
        codes = self.codes
        slopes = code_grad(
            residual, codes.indices, self.sae.W_dec, None, codes.offsets, backend=self.sae.backend
        )
        return self.by_latent(slopes * codes.values)

    def by_latent(self, entries: torch.Tensor) -> torch.Tensor:
        term = self.order.term(entries, None)
        return row_grad([term], self.codes.n_latents, 1, backend=self.sae.backend).flatten()


@torch.no_grad()
def fit_scales(sae: SparseAutoencoder, x: torch.Tensor, *, iterations: int = 30) -> torch.Tensor:
    """Scales s of the latents that minimise ``sum |x - b_dec - sum_f s_f code_f W_dec[f]|^2``.

    Args:
        sae: trained, with ReLU codes.
        x: fp32 [n, input width], activations in the scale of training.
        iterations: of conjugate gradients on the normal equations, scaled by their diagonal.

    Returns:
        fp32 [F]; 1 for a latent that fired on none of them, and never below a tenth.

    Example:
        >>> from sae_kernels.nn import ReLUSAE
        >>> fit_scales(ReLUSAE(8, 32), torch.randn(512, 8)).shape
        torch.Size([32])
    """
    codes = sae.encode_scaled(x)
    problem = _Codes(sae, codes)
    residual = x - sae.decode_scaled(codes)
    norms = sae.W_dec.square().sum(1)
    diagonal = problem.by_latent(codes.values.square()) * norms
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    gradient = problem.transposed(residual)
    direction = inverse * gradient
    scales = torch.ones_like(gradient)
    gamma = (gradient * direction).sum()
    for _ in range(iterations):
        change = problem.reconstruct(direction)
        length = change.square().sum()
        if not (gamma > 0 and length > 0):
            break
        step = gamma / length
        scales += step * direction
        residual -= step * change
        gradient = problem.transposed(residual)
        conditioned = inverse * gradient
        before, gamma = gamma, (gradient * conditioned).sum()
        direction = conditioned + gamma / before * direction
    return scales.clamp(min=_LEAST)


@torch.no_grad()
def scale_latents_(sae: SparseAutoencoder, scales: torch.Tensor) -> None:
    """Multiplies codes by positive scales, folded into the encoder: ``s relu(h) = relu(s h)``."""
    sae.W_enc.mul_(scales[:, None])
    sae.b_enc.mul_(scales)
