"""decode: reconstructions from codes, a sum of K gathered decoder rows per token.

``x_hat = b_dec + sum_j values[j] * W_dec[indices[j]]`` in the accumulator dtype. With
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


def check_codes(values: torch.Tensor, indices: torch.Tensor, W: torch.Tensor) -> None:
    """Raises for codes and a decoder that do not belong together."""
    checks.shape("W_dec", W, ["F", "D"], "latents first")
    checks.shape("values", values, ["B", "K"], "tokens by kept entries")
    checks.shape("indices", indices, list(values.shape), "one latent per value")
    checks.dtype("W_dec", W, checks.OPERAND_DTYPES)
    checks.dtype("values", values, (checks.accumulator(W.dtype),))
    checks.indices("indices", indices)


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
) -> None:
    check_codes(values, indices, W)
    check_groups(group_ends)
    checks.shape("b_dec", b_dec, [W.shape[1]], "one bias per output")
    checks.dtype("b_dec", b_dec, (values.dtype,))
    checks.same_device(values=values, indices=indices, W_dec=W, b_dec=b_dec, group_ends=group_ends)


def _fake(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
) -> torch.Tensor:
    shape = (values.shape[0], W.shape[1])
    return values.new_empty(shape if group_ends is None else (group_ends.shape[0], *shape))


decode = Operator(
    "decode(Tensor values, Tensor indices, Tensor W, Tensor? b_dec, Tensor? group_ends,"
    " str backend) -> Tensor",
    _check,
    _fake,
    dtype_of=2,
)
