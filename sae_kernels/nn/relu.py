"""ReLU: every positive latent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.nn.sae import SparseAutoencoder

if TYPE_CHECKING:
    import torch

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.config import ReLUConfig


class ReLUSAE(SparseAutoencoder):
    """``x_hat = b_dec + W_dec^T relu(W_enc (x - b_dec) + b_enc)``.

    Sparse by its penalty: L1 (Bricken et al. 2023), L1 weighted by the decoder norm (Conerly et
    al., April 2024) or L_p with p falling from 1 (Karvonen et al., arXiv 2408.00113).

    Example:
        >>> import torch
        >>> from sae_kernels.nn import ReLUConfig, ReLUSAE
        >>> sae = ReLUSAE(ReLUConfig(d_in=8, n_latents=32))
        >>> bool((sae.encode(torch.randn(5, 8)).values > 0).all())
        True
    """

    config: ReLUConfig

    def __init__(self, config: ReLUConfig, **options: Any) -> None:
        super().__init__(config, **options)

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> SparseCodes:
        """The positive pre-activations of each token."""
        return self._above(x_centred, W_enc, 0.0)
