"""decode_residual: decode, compare and differentiate in one visit of the decoder rows.

``e = x_hat - target``, ``sse = sum_d e^2`` per token and ``code_grad[j] = <e, W_dec[indices[j]]>``,
so the loss ``c * sum(sse)`` has the code gradients ``2 c * code_grad``. With ``drop_zeros`` (codes
after a ReLU) an entry of value 0 is a dropped one and its gradient is 0. Codes are [B, K] or
ragged, as of :mod:`~sae_kernels.primitives.decode`.

With ``group_ends`` (Matryoshka) there are G prefix reconstructions, ``sse`` is [G, B] and the loss
``sum_g c_g sum(sse[g])`` differentiates each latent through every prefix that holds it: ``e`` is
[G, B, D] with ``e[g] = sum_{i >= g} group_weights[i] * (x_hat_i - target)`` (weights of 1 if there
are none), and a latent's ``code_grad`` takes the row of its group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives import checks
from sae_kernels.primitives.decode import check_codes, check_groups
from sae_kernels.primitives.operator import Operator

if TYPE_CHECKING:
    import torch


def _check(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    drop_zeros: bool,
    group_ends: torch.Tensor | None,
    group_weights: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> None:
    check_codes(values, indices, W, offsets)
    check_groups(group_ends)
    tokens = checks.n_tokens(values, offsets)
    checks.shape("b_dec", b_dec, [W.shape[1]], "one bias per output")
    checks.shape("target", target, [tokens, W.shape[1]], "tokens by outputs")
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


def _fake(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    drop_zeros: bool,
    group_ends: torch.Tensor | None,
    group_weights: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = checks.n_tokens(values, offsets)
    groups = () if group_ends is None else (group_ends.shape[0],)
    return (
        values.new_empty((*groups, tokens, W.shape[1])),
        values.new_empty((*groups, tokens)),
        values.new_empty(values.shape),
    )


decode_residual = Operator(
    "decode_residual(Tensor values, Tensor indices, Tensor W, Tensor? b_dec, Tensor target,"
    " bool drop_zeros, Tensor? group_ends, Tensor? group_weights, Tensor? offsets, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _check,
    _fake,
    dtype_of=2,
)
