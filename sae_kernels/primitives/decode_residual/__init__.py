"""Residuals, squared errors and gradients of the codes in one visit of the decoder rows."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive(decided_by="W")
def decode_residual(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    drop_zeros: bool,
    group_ends: torch.Tensor | None = None,
    group_weights: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    blocks: int = 1,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decodes, compares with the target and differentiates, reading each decoder row once.

    ``e = x_hat - target``, ``sse = sum_d e^2`` per token and ``grad[j] = <e, W[indices[j]]>``, so
    that the loss ``c * sum(sse)`` has the gradients ``2 c * grad`` in the values.

    With ``group_ends`` (Matryoshka) there are G prefix reconstructions, ``sse`` is [G, B] and the
    loss ``sum_g c_g sum(sse[g])`` differentiates each latent through every prefix that holds it:
    ``e`` is [G, B, D] with ``e[g] = sum_{i >= g} group_weights[i] * (x_hat_i - target)`` (weights
    of 1 if there are none), and a latent's gradient takes the row of its group.

    Args:
        values: [B, K], or ragged [N], in the accumulator dtype.
        indices: latents, int32, one per value.
        W: decoder [F, D] in an operand dtype.
        b_dec: bias [D] in the accumulator dtype, or None.
        target: [B, D] in the accumulator dtype.
        drop_zeros: whether an entry of value 0 is a dropped one, whose gradient is 0 (codes after
            a ReLU).
        group_ends: int32 [G], ascending latent numbers that end with F, or None.
        group_weights: [G] in the accumulator dtype, or None.
        offsets: int32 [B + 1] with ragged codes: the entries ``offsets[t]`` to ``offsets[t + 1]``
            are token t's.
        blocks: equal blocks of latents that are summed up first and then added in the order of a
            binary tree, 1 to 64, a divisor of F.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        ``e``, ``sse`` and the gradients of the values, all in the accumulator dtype.
    """
    checks.codes(values, indices, W, offsets)
    checks.group_ends(group_ends)
    checks.blocks(blocks, W.shape[0])
    tokens, width = checks.n_tokens(values, offsets), W.shape[1]
    checks.shape("b_dec", b_dec, [width], "one bias per output")
    checks.shape("target", target, [tokens, width], "tokens by outputs")
    if group_weights is not None:
        if group_ends is None:
            raise ValueError("group_weights: expected group_ends with them, got none")
        checks.shape("group_weights", group_weights, [group_ends.shape[0]], "one per group")
    for name, tensor in (("b_dec", b_dec), ("target", target), ("group_weights", group_weights)):
        checks.dtype(name, tensor, (values.dtype,))
    checks.same_device(
        values=values,
        b_dec=b_dec,
        target=target,
        group_ends=group_ends,
        group_weights=group_weights,
    )
    groups = () if group_ends is None else (group_ends.shape[0],)
    shapes = ([*groups, tokens, width], [*groups, tokens], values.shape)
    e, sse, grad = (result(shape, values.dtype) for shape in shapes)
    return e, sse, grad
