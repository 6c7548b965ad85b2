"""Gated: one reading of the encoder decides which latents fire, another how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sae_kernels import functional
from sae_kernels.nn.sae import SparseAutoencoder

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.config import GatedConfig


class GatedSAE(SparseAutoencoder):
    """Gated SAE (Rajamanoharan et al., arXiv 2404.16014) on one encoder product.

    With ``a = W_enc (x - b_dec)`` a latent fires where ``a + b_enc > 0`` and its code is
    ``relu(exp(r_mag) a + b_mag)``; b_enc is the paper's b_gate.

    Example:
        >>> from sae_kernels.nn import GatedConfig, GatedSAE
        >>> sae = GatedSAE(GatedConfig(d_in=8, n_latents=32))
        >>> sae(torch.randn(5, 8)).x_hat.shape
        torch.Size([5, 8])
    """

    config: GatedConfig

    def __init__(self, config: GatedConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> SparseCodes:
        """The positive gate pre-activations of each token."""
        return self._above(x_centred, W_enc, 0.0)

    def activate(self, pre: SparseCodes) -> SparseCodes:
        """The magnitudes of the latents whose gate is open."""

        def of(vector: torch.Tensor) -> torch.Tensor:
            return functional.of_latents(vector, pre, backend=self.backend)

        a = pre.values - of(self.b_enc)  # the product brought the gate's bias with it
        size = (of(self.r_mag.exp()) * a + of(self.b_mag)).relu()
        return pre.with_values(torch.where(pre.values <= 0, 0, size))

    def auxiliary(self, pre: SparseCodes) -> SparseCodes:
        """The gate itself as codes: what teaches it, since no gradient passes the step."""
        return pre.with_values(pre.values.relu())

    @property
    def auxiliary_stops_decoder(self) -> bool:
        """The paper's frozen decoder, unless the configuration frees it (SAELens)."""
        return self.config.frozen_decoder

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """Both biases are measured in pre-activations."""
        super().fold_vectors_(scale, target_scale)
        self.b_mag.div_(scale)
