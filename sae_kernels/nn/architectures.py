"""The architectures by name, and modules from their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.nn.batch_topk import BatchTopKSAE
from sae_kernels.nn.config import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    SwitchConfig,
    TopKConfig,
)
from sae_kernels.nn.gated import GatedSAE
from sae_kernels.nn.jumprelu import JumpReLUSAE
from sae_kernels.nn.relu import ReLUSAE
from sae_kernels.nn.switch import SwitchSAE
from sae_kernels.nn.topk import TopKSAE

if TYPE_CHECKING:
    from sae_kernels.nn.sae import SparseAutoencoder

MODULES: dict[type[SAEConfig], type[SparseAutoencoder]] = {
    TopKConfig: TopKSAE,
    BatchTopKConfig: BatchTopKSAE,
    JumpReLUConfig: JumpReLUSAE,
    ReLUConfig: ReLUSAE,
    GatedConfig: GatedSAE,
    SwitchConfig: SwitchSAE,
}
CONFIGS: dict[str, type[SAEConfig]] = {config.architecture: config for config in MODULES}


def build(config: SAEConfig, **options: Any) -> SparseAutoencoder:
    """A fresh module of the configuration's architecture.

    Example:
        >>> from sae_kernels.nn import JumpReLUConfig, build
        >>> type(build(JumpReLUConfig(d_in=8, n_latents=32))).__name__
        'JumpReLUSAE'
    """
    return MODULES[type(config)](config, **options)


def from_weights(config: SAEConfig, weights: dict[str, torch.Tensor]) -> SparseAutoencoder:
    """A module in evaluation mode that holds these tensors.

    Raises:
        RuntimeError: tensors are missing, too many or of another shape; torch names them.
    """
    with torch.device("meta"):
        sae = build(config)
    sae.load_state_dict(weights, assign=True)
    return sae.eval()
