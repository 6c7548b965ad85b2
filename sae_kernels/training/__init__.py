"""Training runs on activations: the loop, checkpoints, settings and evaluation."""

from sae_kernels.training.description_length import DescriptionLength, DescriptionLengthSums
from sae_kernels.training.evaluate import Evaluation, evaluate
from sae_kernels.training.fresh import prepare
from sae_kernels.training.resample import resample_dead_
from sae_kernels.training.run_config import RunConfig
from sae_kernels.training.trainer import TrainingResult, train, train_many

__all__ = [
    "DescriptionLength",
    "DescriptionLengthSums",
    "Evaluation",
    "RunConfig",
    "TrainingResult",
    "evaluate",
    "prepare",
    "resample_dead_",
    "train",
    "train_many",
]
