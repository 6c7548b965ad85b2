"""Training: data, losses, optimizer steps and the trainer."""

from sae_kernels.data.batches import ShuffledBatches, TensorRows, estimate_scale
from sae_kernels.data.joint import JointRows
from sae_kernels.data.shards import ShardDataset, ShardWriter
from sae_kernels.runs.options import OutputConfig
from sae_kernels.train.composable import ComposableStep
from sae_kernels.train.config import TrainConfig
from sae_kernels.train.data_config import DataConfig
from sae_kernels.train.description_length import DescriptionLength, DescriptionLengthSums
from sae_kernels.train.end_to_end import EndToEnd, EndToEndLoss, end_to_end_loss
from sae_kernels.train.end_to_end_loop import train_end_to_end
from sae_kernels.train.evaluate import Evaluation, evaluate
from sae_kernels.train.presets import PRESETS, nested_groups, preset
from sae_kernels.train.run_config import RunConfig
from sae_kernels.train.step import FusedStep, StepResult
from sae_kernels.train.through_model import prepare_end_to_end
from sae_kernels.train.trainer import TrainingResult, train, train_many

__all__ = [
    "PRESETS",
    "ComposableStep",
    "DataConfig",
    "DescriptionLength",
    "DescriptionLengthSums",
    "EndToEnd",
    "EndToEndLoss",
    "Evaluation",
    "FusedStep",
    "JointRows",
    "OutputConfig",
    "RunConfig",
    "ShardDataset",
    "ShardWriter",
    "ShuffledBatches",
    "StepResult",
    "TensorRows",
    "TrainConfig",
    "TrainingResult",
    "end_to_end_loss",
    "estimate_scale",
    "evaluate",
    "nested_groups",
    "prepare_end_to_end",
    "preset",
    "train",
    "train_end_to_end",
    "train_many",
]
