"""The largest positive scores of a whole batch of tokens, straight from the encoder product."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive()
def select_batch_topk(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    count: int,
    rank_scale: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Selects the ``count`` largest positive scores of all tokens together, as ragged codes.

    The scores are ``h = x W^T + b`` in the accumulator dtype. Of all entries with ``h > 0`` and
    ``h * rank_scale > 0`` (or NaN) the first ``count`` in the order (``h * rank_scale`` descending,
    NaN first, then token and latent ascending) are kept, or all where there are fewer: exactly
    min(count, positives).

    Args:
        x: tokens [B, D] in an operand dtype.
        W: encoder [F, D] in the dtype of x.
        b: bias [F] in the accumulator dtype, or None.
        count: entries to keep.
        rank_scale: [F] in the accumulator dtype, or None for ones.
        start: a guess of the last kept ``h * rank_scale``, such as the batch before had, as a
            tensor of shape []. It decides how much work is done and never what comes out; where it
            is not positive and finite, a sample of the tokens decides.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Values ``h`` [N] in the accumulator dtype, latents int32 [N] and offsets int32 [B + 1]; the
        entries ``offsets[t]`` to ``offsets[t + 1]`` are token t's, in latent order.
    """
    checks.encoder(x, W, b, rank_scale=rank_scale)
    checks.shape("start", start, [], "one number for all latents")
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    found = [None]
    values, indices = result(found, checks.accumulator(x.dtype)), result(found, torch.int32)
    return values, indices, result([x.shape[0] + 1], torch.int32)
