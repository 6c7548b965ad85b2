"""Sparse autoencoders as torch modules, one file per architecture."""

from sae_kernels.config.sae import SAEConfig
from sae_kernels.nn.base import SAEOutput, SparseAutoencoder
from sae_kernels.nn.batch_topk import BatchTopKConfig, BatchTopKSAE
from sae_kernels.nn.cross_layer import CrossLayer, CrossLayerConfig
from sae_kernels.nn.cross_layer_architectures import (
    CrossLayerBatchTopK,
    CrossLayerBatchTopKConfig,
    CrossLayerBatchTopKObjective,
    CrossLayerJumpReLU,
    CrossLayerJumpReLUConfig,
    CrossLayerJumpReLUObjective,
    CrossLayerTopK,
    CrossLayerTopKConfig,
    CrossLayerTopKObjective,
)
from sae_kernels.nn.gated import GatedConfig, GatedSAE
from sae_kernels.nn.initialise import geometric_median
from sae_kernels.nn.jumprelu import JumpReLUConfig, JumpReLUObjective, JumpReLUSAE
from sae_kernels.nn.matching_pursuit import (
    MatchingPursuitConfig,
    MatchingPursuitObjective,
    MatchingPursuitSAE,
)
from sae_kernels.nn.objective import nested_groups
from sae_kernels.nn.registry import (
    Preset,
    architecture,
    architectures,
    build,
    from_weights,
    preset,
    presets,
    register,
)
from sae_kernels.nn.relu import ReLUConfig, ReLUObjective, ReLUSAE
from sae_kernels.nn.switch import SwitchConfig, SwitchObjective, SwitchSAE
from sae_kernels.nn.topk import TopKConfig, TopKObjective, TopKSAE

__all__ = [
    "BatchTopKConfig",
    "BatchTopKSAE",
    "CrossLayer",
    "CrossLayerBatchTopK",
    "CrossLayerBatchTopKConfig",
    "CrossLayerBatchTopKObjective",
    "CrossLayerConfig",
    "CrossLayerJumpReLU",
    "CrossLayerJumpReLUConfig",
    "CrossLayerJumpReLUObjective",
    "CrossLayerTopK",
    "CrossLayerTopKConfig",
    "CrossLayerTopKObjective",
    "GatedConfig",
    "GatedSAE",
    "JumpReLUConfig",
    "JumpReLUObjective",
    "JumpReLUSAE",
    "MatchingPursuitConfig",
    "MatchingPursuitObjective",
    "MatchingPursuitSAE",
    "Preset",
    "ReLUConfig",
    "ReLUObjective",
    "ReLUSAE",
    "SAEConfig",
    "SAEOutput",
    "SparseAutoencoder",
    "SwitchConfig",
    "SwitchObjective",
    "SwitchSAE",
    "TopKConfig",
    "TopKObjective",
    "TopKSAE",
    "architecture",
    "architectures",
    "build",
    "from_weights",
    "geometric_median",
    "nested_groups",
    "preset",
    "presets",
    "register",
]
