"""The k best latents of every token among those of its own expert."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive()
def select_topk_routed(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    narrow: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects the k latents with the largest scores of every token, among its expert's alone.

    The F latents belong to E experts, equal parts one after the other, and only those of a token's
    expert are multiplied with it. Scores and order are those of the selection among all latents;
    with one expert the result is the same bit for bit.

    Args:
        x: tokens [B, D] in an operand dtype.
        W: encoder [F, D] in the dtype of x.
        b: bias [F] in the accumulator dtype, or None.
        k: latents to keep, 1 to F / E.
        tokens: int32 [B], every token once, by expert.
        starts: int32 [E + 1]; expert e's tokens are ``tokens[starts[e]:starts[e + 1]]``.
        narrow: as of :func:`~sae_kernels.primitives.select_topk.select_topk`.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Values ``h`` [B, k] in the accumulator dtype and latents int32 [B, k], numbered among all F;
        both in ranked order.
    """
    checks.encoder(x, W, b)
    checks.narrow(narrow, W)
    checks.shape("tokens", tokens, [x.shape[0]], "every token once, by expert")
    checks.shape("starts", starts, ["E + 1"], "where each expert's tokens start")
    for name, tensor in (("tokens", tokens), ("starts", starts)):
        checks.indices(name, tensor)
    checks.same_device(x=x, tokens=tokens, starts=starts)
    n_experts, n_latents = starts.shape[0] - 1, W.shape[0]
    if n_experts < 1 or n_latents % n_experts:
        raise ValueError(
            f"starts: expected a number of experts that divides n_latents = {n_latents}, got "
            f"{n_experts}"
        )
    if not 1 <= k <= n_latents // n_experts:
        raise ValueError(
            f"k: expected 1 <= k <= {n_latents // n_experts}, the latents of one of the "
            f"{n_experts} experts, got {k}"
        )
    kept = (x.shape[0], k)
    return result(kept, checks.accumulator(x.dtype)), result(kept, torch.int32)
