"""Reconstructions from codes: a weighted sum of decoder rows per token."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive(decided_by="W")
def decode(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None = None,
    group_ends: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    blocks: int = 1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Reconstructs every token: ``x_hat = b_dec + sum_j values[j] * W[indices[j]]``.

    Sums are in the accumulator dtype. An entry whose value is 0 is a dropped one and adds nothing,
    whatever its row holds. With ``group_ends`` there are G reconstructions, and number g sums the
    latents below ``group_ends[g]``: the prefixes of a Matryoshka SAE.

    Args:
        values: [B, K], or ragged [N], in the accumulator dtype.
        indices: latents, int32, one per value.
        W: decoder [F, D] in an operand dtype.
        b_dec: bias [D] in the accumulator dtype, or None.
        group_ends: int32 [G], ascending latent numbers that end with F, or None.
        offsets: int32 [B + 1] with ragged codes: the entries ``offsets[t]`` to ``offsets[t + 1]``
            are token t's.
        blocks: equal blocks of latents that are summed up first and then added in the order of a
            binary tree, 1 to 64, a divisor of F.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Reconstructions [B, D], or [G, B, D] with groups, in the accumulator dtype.
    """
    checks.codes(values, indices, W, offsets)
    checks.group_ends(group_ends)
    checks.blocks(blocks, W.shape[0])
    checks.shape("b_dec", b_dec, [W.shape[1]], "one bias per output")
    checks.dtype("b_dec", b_dec, (values.dtype,))
    checks.same_device(values=values, b_dec=b_dec, group_ends=group_ends)
    groups = () if group_ends is None else (group_ends.shape[0],)
    return result([*groups, checks.n_tokens(values, offsets), W.shape[1]], values.dtype)
