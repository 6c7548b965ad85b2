"""The processes that torchrun started, as a mesh."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sae_kernels.distributed.faults import first_cause, introduce
from sae_kernels.gpu import training_device
from sae_kernels.runs.interrupts import terminable

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
        ValueError: a number of processes that the settings do not allow.
        RankError: for any error in the block of this or another process, it names the rank.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parallel.layouts(len(parallel.training_ranks(world)))
    kind = training_device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    wait = timedelta(seconds=parallel.timeout)
    store, rank, _ = next(rendezvous("env://"))
    # torchrun's store may be that of the attempt before, with the addresses of its processes.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"sae_kernels/{attempt}", store)
    # Processes start one after the other, for which the setting may be too short.
    introduce(store, rank)
    store.wait([f"there/{each}" for each in range(world)])
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    with terminable():
        try:
            yield init_device_mesh(kind, (world,))
        except BaseException as raised:
            error = _failure(raised)
            if error is None:
                raise
            # torchrun ends those that are left when the first is gone; they say why before.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            dist.destroy_process_group()
            raise first_cause(error, store, rank, world) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _failure(error: BaseException | None) -> Exception | None:
    """The failure, also of a rank that torchrun's signal met on its way out with one."""
    while error is not None and not isinstance(error, Exception):
        error = error.__context__
    return error
