"""Training: data, losses, optimizer steps and the trainer."""

from sae_kernels.train.batches import ShuffledBatches, TensorRows, estimate_scale
from sae_kernels.train.composable import ComposableStep
from sae_kernels.train.config import TrainConfig
from sae_kernels.train.evaluate import Evaluation, evaluate
from sae_kernels.train.shards import ShardDataset, ShardWriter
from sae_kernels.train.step import FusedStep, StepResult
from sae_kernels.train.trainer import TrainingResult, train

__all__ = [
    "ComposableStep",
    "Evaluation",
    "FusedStep",
    "ShardDataset",
    "ShardWriter",
    "ShuffledBatches",
    "StepResult",
    "TensorRows",
    "TrainConfig",
    "TrainingResult",
    "estimate_scale",
    "evaluate",
    "train",
]
