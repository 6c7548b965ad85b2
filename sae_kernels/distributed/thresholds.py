"""One BatchTopK threshold for all processes of a user's own data-parallel loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from sae_kernels.nn import BatchTopKSAE


@torch.no_grad()
def average_last_key_(sae: BatchTopKSAE, group: ProcessGroup | None = None) -> None:
    """Sets a BatchTopK SAE's ``last_key`` to its mean over ranks, the same bits on all.

    Each rank keeps the int(k B) largest entries of its own B tokens, so that their smallest keys
    differ. Call it on all ranks after the forward pass in training and before ``after_step_``: the
    inference threshold is then the moving average of the mean. Ranks that kept nothing do not
    count.

    Args:
        sae: in place; the module itself, not what DistributedDataParallel made of it.
        group: the ranks; None: all processes.
    """
    kept = sae.last_key.isfinite()
    sums = torch.stack([torch.where(kept, sae.last_key, 0), kept.to(sae.last_key.dtype)])
    dist.all_reduce(sums, group=group)
    sae.last_key.copy_(torch.where(sums[1] > 0, sums[0] / sums[1], torch.inf))
