"""Settings: of SAEs, of training steps, of runs, and TOML."""

from sae_kernels.config.data import DataConfig
from sae_kernels.config.output import OutputConfig
from sae_kernels.config.train import TrainConfig

__all__ = ["DataConfig", "OutputConfig", "TrainConfig"]
