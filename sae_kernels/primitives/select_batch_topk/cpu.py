"""select_batch_topk on the host kernels: by a certified bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives.select_batch_topk.certified import ScoreSource, select
from sae_kernels.primitives.select_threshold import cpu as select_threshold

if TYPE_CHECKING:
    import torch

note = select_threshold.note


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    count: int,
    rank_scale: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Selects among the scores that the host kernel finds above a bound."""
    return select(ScoreSource(select_threshold.run, x, W, b, rank_scale), count, start)
