"""The k best latents of every token, straight from the encoder product."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive()
def select_topk(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
    narrow: torch.Tensor | None = None,
    by_magnitude: bool = False,
    floor: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects the k latents with the largest scores of every token, without storing all scores.

    The scores are ``h = x W^T + b`` in the accumulator dtype. A token's latents are ranked by
    ``h * rank_scale``, or by its magnitude, descending, then by number ascending, where NaN of any
    payload ranks above +inf and -0 equals +0. No [B, F] is stored, but for up to 16 tokens on GPUs,
    of at most 32 MiB.

    Args:
        x: tokens [B, D] in an operand dtype.
        W: encoder [F, D] in the dtype of x.
        b: bias [F] in the accumulator dtype, or None.
        k: latents to keep, 1 to F.
        rank_scale: [F] in the accumulator dtype, or None for ones.
        narrow: :func:`~sae_kernels.primitives.narrow.narrowed` of W, or None. The CPU then reads it
            in W's place for 16 tokens or fewer, and of W only rows that it does not rule out; the
            result is the same, bit for bit. Other backends do not read it.
        by_magnitude: rank by ``|h * rank_scale|``; values keep their sign.
        floor: [B] in the accumulator dtype, or None: entries whose keys are below it are not wanted
            and may come as latent 0 of value -inf. It saves the CPU work, where keys are scores;
            other backends do not read it.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Values ``h`` [B, k] in the accumulator dtype, without a ReLU, and latents int32 [B, k], both
        in ranked order.
    """
    checks.encoder(x, W, b, rank_scale=rank_scale)
    checks.narrow(narrow, W)
    if floor is not None:
        checks.shape("floor", floor, [x.shape[0]], "one per token")
        checks.dtype("floor", floor, (checks.accumulator(x.dtype),))
        checks.same_device(x=x, floor=floor)
    if not 1 <= k <= W.shape[0]:
        raise ValueError(f"k: expected 1 <= k <= n_latents = {W.shape[0]}, got {k}")
    kept = (x.shape[0], k)
    return result(kept, checks.accumulator(x.dtype)), result(kept, torch.int32)
