"""select_batch_topk in Triton: by a certified bound."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sae_kernels.primitives.select_batch_topk.certified import ScoreSource, select
from sae_kernels.primitives.select_threshold import triton as select_threshold

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
    screened: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Selects among the scores that the kernels find above a bound; screened as by them."""
    find = partial(select_threshold.run, screened=screened)
    return select(ScoreSource(find, x, W, b, rank_scale), count, start)
