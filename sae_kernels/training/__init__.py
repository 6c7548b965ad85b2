"""The training loop: runs on activations, their settings, and evaluation."""

from sae_kernels.training.description_length import DescriptionLength, DescriptionLengthSums
from sae_kernels.training.evaluate import Evaluation, evaluate
from sae_kernels.training.presets import PRESETS, nested_groups, preset
from sae_kernels.training.run_config import RunConfig
from sae_kernels.training.trainer import TrainingResult, prepare, train, train_many

__all__ = [
    "PRESETS",
    "DescriptionLength",
    "DescriptionLengthSums",
    "Evaluation",
    "RunConfig",
    "TrainingResult",
    "evaluate",
    "nested_groups",
    "prepare",
    "preset",
    "train",
    "train_many",
]
