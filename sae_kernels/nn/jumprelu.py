"""JumpReLU: every latent above a threshold of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sae_kernels import functional
from sae_kernels.nn.sae import SparseAutoencoder

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.config import JumpReLUConfig


class JumpReLUSAE(SparseAutoencoder):
    """``x_hat = b_dec + W_dec^T (h * 1[h > threshold])`` (arXiv 2407.14435).

    The parameter is ``log_threshold`` or ``threshold`` [F], as the configuration says, in fp32
    whatever the module is cast to. In training mode entries within half the bandwidth below the
    threshold are among the codes too, with the value 0: the threshold learns from them.

    Example:
        >>> from sae_kernels.nn import JumpReLUConfig, JumpReLUSAE
        >>> sae = JumpReLUSAE(JumpReLUConfig(d_in=8, n_latents=32, threshold_init=0.5)).eval()
        >>> bool((sae.encode(torch.randn(5, 8)).values > 0.5).all())
        True
    """

    config: JumpReLUConfig

    def __init__(self, config: JumpReLUConfig, **options: Any) -> None:
        super().__init__(config, **options)
        start = math.log(config.threshold_init) if config.log_threshold else config.threshold_init
        self.register_parameter(
            self.threshold_name,
            nn.Parameter(torch.full_like(self.b_enc, start, dtype=torch.float32)),
        )
        self.keeps_dtype = (self.threshold_name,)  # type: ignore[misc]

    @property
    def threshold_name(self) -> str:
        """Of the parameter."""
        return "log_threshold" if self.config.log_threshold else "threshold"

    def thresholds(self) -> torch.Tensor:
        """fp32 [F], differentiable."""
        parameter = self.get_parameter(self.threshold_name)
        return parameter.exp() if self.config.log_threshold else parameter

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> SparseCodes:
        """The pre-activations above the threshold or, in training, above its window."""
        below = self.config.bandwidth / 2 if self.training else 0.0
        return self._above(x_centred, W_enc, self.thresholds().detach() - below)

    def activate(self, pre: SparseCodes) -> SparseCodes:
        """The step at the threshold."""
        return functional.jumprelu(
            pre, self.thresholds(), self.config.bandwidth, backend=self.backend
        )

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """Thresholds are measured in pre-activations too."""
        super().fold_vectors_(scale, target_scale)
        threshold = self.get_parameter(self.threshold_name)
        if self.config.log_threshold:
            threshold.sub_(math.log(scale))
        else:
            threshold.div_(scale)
