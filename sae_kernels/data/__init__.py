"""Activations from shards on disk or tensors in memory, in batches of reproducible order."""

from sae_kernels.data.batches import Batches, ShuffledBatches
from sae_kernels.data.joint import JointRows, side_by_side
from sae_kernels.data.prefetch import Prefetched
from sae_kernels.data.rows import RowSource, TensorRows, estimate_scale
from sae_kernels.data.shard_writer import ShardWriter
from sae_kernels.data.shards import ShardDataset

__all__ = [
    "Batches",
    "JointRows",
    "Prefetched",
    "RowSource",
    "ShardDataset",
    "ShardWriter",
    "ShuffledBatches",
    "TensorRows",
    "estimate_scale",
    "side_by_side",
]
