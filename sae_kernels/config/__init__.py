"""Settings: of SAEs, of training steps, of runs, and TOML."""

from sae_kernels.config.base import Settings
from sae_kernels.config.data import DataConfig
from sae_kernels.config.objective import ObjectiveConfig
from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.config.output import OutputConfig
from sae_kernels.config.sae import SAEConfig
from sae_kernels.config.train import TrainConfig

__all__ = [
    "DataConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OutputConfig",
    "SAEConfig",
    "Settings",
    "TrainConfig",
]
