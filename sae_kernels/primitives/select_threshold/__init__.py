"""All latents of every token whose score is above a bound, straight from the encoder product."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive()
def select_threshold(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    bounds: torch.Tensor,
    narrow: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Selects every latent whose score is not ``<=`` its bound, as ragged codes; NaN is kept.

    The scores are ``h = x W^T + b`` in the accumulator dtype. How many are kept is known when they
    are all found: no capacity, nothing is ever left out. ReLU (bound 0), JumpReLU (a threshold per
    latent, lowered by half the bandwidth where the straight-through estimator asks for the entries
    just below it) and BatchTopK (one bound for all) are this with other bounds.

    Args:
        x: tokens [B, D] in an operand dtype.
        W: encoder [F, D] in the dtype of x.
        b: bias [F] in the accumulator dtype, or None.
        bounds: [F] in the accumulator dtype.
        narrow: as of :func:`~sae_kernels.primitives.select_topk.select_topk`.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Values ``h`` [N] in the accumulator dtype, latents int32 [N] and offsets int32 [B + 1]; the
        entries ``offsets[t]`` to ``offsets[t + 1]`` are token t's, in latent order.
    """
    checks.encoder(x, W, b, bounds=bounds)
    checks.narrow(narrow, W)
    found = [None]
    values, indices = result(found, checks.accumulator(x.dtype)), result(found, torch.int32)
    return values, indices, result([x.shape[0] + 1], torch.int32)
