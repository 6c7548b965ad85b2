"""TopK: the k largest latents of every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels import functional
from sae_kernels.nn.sae import SparseAutoencoder

if TYPE_CHECKING:
    import torch

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.config import TopKConfig


class TopKSAE(SparseAutoencoder):
    """``x_hat = b_dec + W_dec^T topk(W_enc (x - b_dec) + b_enc)`` (arXiv 2406.04093).

    Args and weights as of :class:`~sae_kernels.nn.SparseAutoencoder`. The encoder starts as a copy
    of the decoder, whose rows are random unit vectors.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import TopKConfig, TopKSAE
        >>> sae = TopKSAE(TopKConfig(d_in=8, n_latents=32, k=4))
        >>> output = sae(torch.randn(5, 8))
        >>> output.x_hat.shape, output.codes.indices.shape
        (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    config: TopKConfig

    def __init__(self, config: TopKConfig, **options: Any) -> None:
        super().__init__(config, **options)

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> SparseCodes:
        """The k largest pre-activations of each token, largest first."""
        return functional.encode_topk(
            x_centred,
            self.W_enc if W_enc is None else W_enc,
            self.b_enc,
            self.config.k if k is None else k,  # type: ignore[arg-type]
            relu=False,
            rank_scale=self.rank_scale(),
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )

    def activate(self, pre: SparseCodes) -> SparseCodes:
        """ReLU, unless the variant is without."""
        return super().activate(pre) if self.drops_zeros else pre

    @property
    def drops_zeros(self) -> bool:
        """Whether there is a ReLU."""
        return self.config.relu != "none"
