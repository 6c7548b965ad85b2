"""The processes that torchrun started, as a mesh."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sae_kernels.gpu import training_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh

    from sae_kernels.config.parallel import ParallelConfig


@contextmanager
def launched(parallel: ParallelConfig, device: str) -> Iterator[DeviceMesh]:
    """The mesh of the processes that torchrun started; their group ends with the block.

    Args:
        parallel: the settings, which must fit their number.
        device: the setting of the run.

    Raises:
        ValueError: another number of processes than the settings say.
    """
    world, wanted = int(os.environ.get("WORLD_SIZE", "0")), parallel.latents_over
    if world != wanted:
        raise ValueError(
            f"latents_over: expected the number of processes that torchrun started, {world}, got "
            f"{wanted}; start with torchrun --nproc-per-node {wanted} -m sae_kernels ..."
        )
    kind = training_device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        yield init_device_mesh(kind, (wanted,), mesh_dim_names=("latents",))
    finally:
        dist.destroy_process_group()
