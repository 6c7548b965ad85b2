"""Settings of a run on several processes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sae_kernels.config.base import NATURAL, POSITIVE_INTEGER, SCALE, Settings, setting


@dataclasses.dataclass(frozen=True)
class ParallelConfig(Settings):
    """Settings of training on several processes, started by torchrun (docs/distributed.md).

    Example:
        >>> ParallelConfig(latents_over=4).blocks
        0
    """

    table = "parallel"

    latents_over: int = setting(
        1,
        "processes that the latents are spread over, those of torchrun",
        POSITIVE_INTEGER,
    )
    blocks: int = setting(
        0,
        "blocks of latents whose sums are added in one order, a divisor of n_latents: runs on as "
        "many processes as leave each a power of two of them have the same bits; 0 is the fastest",
        NATURAL,
    )
    timeout: float = setting(
        600.0,
        "seconds to wait for a process that does not answer; all others stop then",
        SCALE,
    )
    partial_sums: Literal["float32", "bfloat16"] = setting(
        "float32",
        "how processes send each other their parts of reconstructions; bfloat16 is half the bytes "
        "and an error of 2^-9 of each part (docs/distributed.md)",
    )
