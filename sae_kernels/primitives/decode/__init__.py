"""decode: reconstructions from codes, a sum of gathered decoder rows per token.

``x_hat = b_dec + sum_j values[j] * W_dec[indices[j]]`` in the accumulator dtype. Codes have K
entries a token, [B, K], or are ragged: values and indices [N] and ``offsets`` [B + 1], token t's
entries being ``offsets[t]`` to ``offsets[t + 1]``. With
``group_ends`` (ascending latent numbers, the last being n_latents) the result is [G, B, D] and
part g sums the latents below ``group_ends[g]``: the prefixes of a Matryoshka SAE. An entry whose
value is 0 is a dropped one and adds nothing, whatever its row holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator

if TYPE_CHECKING:
    import torch


def check_codes(
    values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor, offsets: torch.Tensor | None
) -> None:
    """Raises for codes and a decoder that do not belong together."""
    checks.shape("W_dec", W, ["F", "D"], "latents first")
    checks.shape("indices", indices, list(values.shape), "one latent per value")
    check_entries("values", values, offsets)
    checks.dtype("W_dec", W, checks.OPERAND_DTYPES)
    checks.dtype("values", values, (checks.accumulator(W.dtype),))
    checks.indices("indices", indices)
    checks.same_device(values=values, indices=indices, W_dec=W, offsets=offsets)


def check_entries(name: str, entries: torch.Tensor, offsets: torch.Tensor | None) -> None:
    """Raises for entries that are neither [B, K] nor [N] with offsets."""
    if offsets is None:
        checks.shape(name, entries, ["B", "K"], "tokens by kept entries")
        return
    checks.shape(name, entries, ["N"], "the entries of all tokens, with offsets")
    checks.shape("offsets", offsets, ["B + 1"], "where each token's entries start")
    checks.indices("offsets", offsets)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: expected shape [B + 1], got [0]; no token still has one offset")


def check_groups(group_ends: torch.Tensor | None) -> None:
    """Raises for group ends that are not a vector of int32."""
    if group_ends is not None:
        checks.shape("group_ends", group_ends, ["G"], "the latent at which each group ends")
        checks.indices("group_ends", group_ends)


def _check(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> None:
    check_codes(values, indices, W, offsets)
    check_groups(group_ends)
    checks.shape("b_dec", b_dec, [W.shape[1]], "one bias per output")
    checks.dtype("b_dec", b_dec, (values.dtype,))
    checks.same_device(values=values, b_dec=b_dec, group_ends=group_ends)


def _fake(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    shape = (checks.n_tokens(values, offsets), W.shape[1])
    return values.new_empty(shape if group_ends is None else (group_ends.shape[0], *shape))


decode = Operator(
    "decode(Tensor values, Tensor indices, Tensor W, Tensor? b_dec, Tensor? group_ends,"
    " Tensor? offsets, str backend) -> Tensor",
    _check,
    _fake,
    dtype_of=2,
)
