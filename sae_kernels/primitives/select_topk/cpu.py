"""select_topk on the host kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.primitives.tensors import packed


class Routes(NamedTuple):
    """The tokens of every expert, which meet its part of the latents alone.

    Attributes:
        tokens: int32 [B], every token once, by expert.
        starts: int32 [E + 1], where each expert's tokens start.
    """

    tokens: torch.Tensor
    starts: torch.Tensor


# A token's first scores are computed in fp32, some fifty for each that is kept.
_LATENTS_PER_KEPT = 256


def note(dtype: torch.dtype) -> str | None:
    """What `explain` adds about calls of this dtype."""
    return cpu.encoder_note(dtype, f", {_LATENTS_PER_KEPT} for each that is kept")


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    narrow: torch.Tensor | None = None,
    by_magnitude: bool = False,
    floor: torch.Tensor | None = None,
    routes: Routes | None = None,
    screening: cpu.Screening | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/select_topk.cpp.

    Whether and how scores are screened by a product in 8 bits first (docs/numerics.md) makes no
    difference to the result; None takes the screen where it is faster. Magnitudes are not screened:
    its bounds have one side.
    """
    n_experts = 1 if routes is None else routes.starts.shape[0] - 1
    if screening is None:
        B, D, F = x.shape[0] // n_experts, x.shape[1], W.shape[0] // n_experts
        few = not by_magnitude and _LATENTS_PER_KEPT * k <= F
        screening = cpu.screens(B, D, F, x.dtype) if few else cpu.Screening.NONE
    operands = [packed(t) for t in (x, W, b, rank_scale, narrow, floor)]
    values = x.new_empty((x.shape[0], k), dtype=checks.accumulator(x.dtype))
    indices = x.new_empty((x.shape[0], k), dtype=torch.int32)
    by_expert: tuple[Any, ...] = (None, None, 1)
    if routes is not None:
        by_expert = (*map(packed, routes), n_experts)
    sizes = (*x.shape, W.shape[0], k)
    valid = cpu.run_with_workspace(
        "select_topk",
        cpu.code(x.dtype),
        *operands,
        values,
        indices,
        *sizes,
        by_expert,
        screening,
        by_magnitude,
    )
    if routes is not None and not valid:
        checks.routes(*routes)
    return values, indices
