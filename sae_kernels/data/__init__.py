"""Activations: on disk, in memory, in a reproducible random order."""

from sae_kernels.data.batches import RowSource, ShuffledBatches, TensorRows, estimate_scale
from sae_kernels.data.joint import JointRows
from sae_kernels.data.shards import ShardDataset, ShardWriter

__all__ = [
    "JointRows",
    "RowSource",
    "ShardDataset",
    "ShardWriter",
    "ShuffledBatches",
    "TensorRows",
    "estimate_scale",
]
