"""Real processes for tests: a function runs on every rank of a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "sae_kernels.training",
        "sae_kernels.distributed.folder",
        "tests.distributed.runs",
        "transformers.models.gpt2.modeling_gpt2",  # once for all ranks that run a model
        __name__,
    ]
)
TIMEOUT = 120  # seconds, on a busy machine


def _run(
    rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    wait = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=wait)
    try:
        outcome = ("done", function(dist.group.WORLD, *args))
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    torch.save(outcome, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def on_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(group, *args)`` returns on each of ``size`` ranks.

    It is one that a module defines, and returns tensors and plain values.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            FORKED.Process(target=_run, args=(rank, size, folder, function, args))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT)
        for process in ranks:
            if process.is_alive():
                process.kill()
        results = []
        for rank in range(size):
            path = Path(folder, f"{rank}.pt")
            assert path.exists(), f"rank {rank} of {size} ended without a result"
            state, value = torch.load(path, weights_only=True)
            assert state == "done", f"rank {rank} of {size}:\n{value}"
            results.append(value)
        return results


def torchrun(
    size: int, *arguments: str, module: str = "sae_kernels", restarts: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a module's command line on so many ranks by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--max-restarts", str(restarts), "-m", module, *arguments]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
