"""pick_dead: the longest dead latents, chosen without the host knowing how many there are.

A latent is dead when ``since_fired[f] >= after``. Taken are the ``at_most`` that have been dead for
longest, ties to the lower latent; ``latents`` holds them in ascending order, padded with -1 to
min(at_most, F) places, and ``count`` is their number.
"""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator


def _check(since_fired: torch.Tensor, after: int, at_most: int) -> None:
    checks.shape("since_fired", since_fired, ["F"], "one counter per latent")
    checks.dtype("since_fired", since_fired, (torch.int64,))
    if after < 1 or at_most < 0:
        raise ValueError(
            f"after and at_most: expected at least 1 and at least 0, got {after} and {at_most}"
        )


def _fake(since_fired: torch.Tensor, after: int, at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
    latents = since_fired.new_empty(min(at_most, since_fired.shape[0]), dtype=torch.int32)
    return latents, since_fired.new_empty((), dtype=torch.int32)


pick_dead = Operator(
    "pick_dead(Tensor since_fired, int after, int at_most, str backend) -> (Tensor, Tensor)",
    _check,
    _fake,
)
