"""The gradient of the codes' values from the gradient of the reconstructions."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive(decided_by="W")
def code_grad(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Multiplies every selected decoder row with its token's gradient: dL/dvalues from dL/dx_hat.

    ``out[b, j] = <grad[b], W[indices[b, j]]>``. With ``group_ends`` an entry takes the gradient of
    its latent's group, the first whose end lies above the latent.

    Args:
        grad: dL/dx_hat [B, D], or [G, B, D] with groups, in the accumulator dtype.
        indices: latents, int32 [B, K], or ragged [N].
        W: decoder [F, D] in an operand dtype.
        group_ends: int32 [G], ascending latent numbers that end with F, or None.
        offsets: int32 [B + 1] with ragged codes: the entries ``offsets[t]`` to ``offsets[t + 1]``
            are token t's.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        dL/dvalues in the shape of the indices and the dtype of ``grad``.
    """
    checks.shape("W_dec", W, ["F", "D"], "latents first")
    checks.entries("indices", indices, offsets)
    checks.group_ends(group_ends)
    groups = [] if group_ends is None else [group_ends.shape[0]]
    tokens = checks.n_tokens(indices, offsets)
    checks.shape("grad", grad, [*groups, tokens, W.shape[1]], "a row per token")
    checks.dtype("W_dec", W, checks.OPERAND_DTYPES)
    checks.dtype("grad", grad, (checks.accumulator(W.dtype),))
    checks.indices("indices", indices)
    checks.same_device(grad=grad, indices=indices, W_dec=W, group_ends=group_ends, offsets=offsets)
    return result(indices.shape, grad.dtype)
