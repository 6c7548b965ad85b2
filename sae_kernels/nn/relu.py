"""ReLU: every positive latent."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from sae_kernels.config.base import about
from sae_kernels.config.objective import PenalisedObjective
from sae_kernels.config.sae import SAEConfig
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.presets import FREE_NORMS, Preset
from sae_kernels.nn.registry import register
from sae_kernels.nn.shrinkage import fit_scales, scale_latents_

if TYPE_CHECKING:
    import torch

    from sae_kernels.codes import SparseCodes

_FITTED = 32768  # tokens from which the shrinkage fix is fitted


@dataclasses.dataclass(frozen=True)
class ReLUConfig(SAEConfig):
    """Every positive latent (Bricken et al. 2023; April update of Conerly et al. 2024)."""

    architecture: ClassVar[str] = "relu"


@dataclasses.dataclass(frozen=True)
class ReLUObjective(PenalisedObjective):
    """What a ReLU SAE is trained to minimise; by default squared error and L1, L0 held at 32."""

    fix_shrinkage: bool = field(
        default=False,
        metadata=about(
            "once trained, fit a scale per latent and fold it into the encoder (Wright and "
            "Sharkey 2024): L1 makes codes too small"
        ),
    )


@register
class ReLUSAE(SparseAutoencoder):
    """``x_hat = b_dec + W_dec^T relu(W_enc (x - b_dec) + b_enc)``.

    Sparse by its penalty: L1 (Bricken et al. 2023), L1 weighted by the decoder norm (Conerly et
    al., April 2024) or L_p with p falling from 1 (Karvonen et al., arXiv 2408.00113).

    Example:
        >>> import torch
        >>> from sae_kernels.nn import ReLUSAE
        >>> sae = ReLUSAE(8, 32)
        >>> bool((sae.encode(torch.randn(5, 8)).values > 0).all())
        True
    """

    config: ReLUConfig
    config_class = ReLUConfig
    objective_class = ReLUObjective
    presets: ClassVar[dict[str, Preset]] = {
        "relu": Preset("ReLU and an L1 penalty"),
        "relu_april": Preset(
            "ReLU and L1 weighted by free decoder norms",
            sae=FREE_NORMS,
            objective={"sparsity_norm_weighted": True},
            optimizer={"clip_norm": 1.0},
        ),
        "p_anneal": Preset(
            "ReLU and an L_p penalty, p falling from 1", objective={"sparsity": "lp"}
        ),
        "crosscoder_relu": Preset(
            "ReLU over several layers or models, L1 weighted by the sum of norms",
            sae={**FREE_NORMS, "decoder_norm": "sum"},
            objective={"sparsity_norm_weighted": True},
            data="layers",
        ),
    }

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> SparseCodes:
        """The positive pre-activations of each token."""
        return self._above(x_centred, W_enc, 0.0)

    def sums_over_entries(self, objective: ReLUObjective) -> bool:
        """Always: a latent's code depends on its pre-activation alone."""
        return True

    def rows_to_finish(self, objective: ReLUObjective) -> int:
        """A sample for the shrinkage fix."""
        return _FITTED if objective.fix_shrinkage else 0

    def finish_training_(self, x: torch.Tensor, objective: Any) -> None:
        """Fits the scales of the latents and folds them into the encoder."""
        scale_latents_(self, fit_scales(self, x))
