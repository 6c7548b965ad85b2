"""Modules on top of :mod:`sae_kernels.functional`: one an architecture."""

from sae_kernels.nn.architectures import CONFIGS, build, from_weights
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
from sae_kernels.nn.initialise import geometric_median
from sae_kernels.nn.jumprelu import JumpReLUSAE
from sae_kernels.nn.relu import ReLUSAE
from sae_kernels.nn.sae import SAEOutput, SparseAutoencoder
from sae_kernels.nn.switch import SwitchSAE
from sae_kernels.nn.topk import TopKSAE

__all__ = [
    "CONFIGS",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "GatedConfig",
    "GatedSAE",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "ReLUConfig",
    "ReLUSAE",
    "SAEConfig",
    "SAEOutput",
    "SparseAutoencoder",
    "SwitchConfig",
    "SwitchSAE",
    "TopKConfig",
    "TopKSAE",
    "build",
    "from_weights",
    "geometric_median",
]
