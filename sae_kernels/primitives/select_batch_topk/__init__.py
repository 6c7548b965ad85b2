"""select_batch_topk: the largest positive scores of a whole batch of tokens, as ragged codes.

``h = x W^T + b`` in the accumulator dtype. Of all entries with ``h > 0`` and ``h * rank_scale > 0``
(or NaN) the first ``count`` in the order (``h * rank_scale`` descending, NaN first, then token and
latent ascending) are kept, or all where there are fewer: exactly min(count, positives) entries,
values ``h``.

``start`` is a guess of the last kept key, such as the one of the batch before. It decides how much
work is done and never what comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator, fake_ragged

if TYPE_CHECKING:
    import torch


def _check(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    count: int,
    rank_scale: torch.Tensor | None,
    start: torch.Tensor | None,
) -> None:
    checks.encoder(x, W, b, rank_scale=rank_scale)
    checks.shape("start", start, [], "one number for all latents")
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")


select_batch_topk = Operator(
    "select_batch_topk(Tensor x, Tensor W, Tensor? b, SymInt count, Tensor? rank_scale,"
    " Tensor? start, str backend) -> (Tensor, Tensor, Tensor)",
    _check,
    lambda x, *_: fake_ragged(x),
)
