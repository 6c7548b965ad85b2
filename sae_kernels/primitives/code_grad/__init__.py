"""code_grad: dL/dvalues from dL/dx_hat, a dot product per selected entry.

``out[b, j] = <grad[b], W_dec[indices[b, j]]>``. With ``group_ends`` the gradient is [G, B, D] and
an entry takes the row of its latent's group, the first whose end lies above the latent. Codes are
[B, K] or ragged, as of :mod:`~sae_kernels.primitives.decode`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives import checks
from sae_kernels.primitives.decode import check_entries, check_groups
from sae_kernels.primitives.operator import Operator

if TYPE_CHECKING:
    import torch


def _check(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> None:
    checks.shape("W_dec", W, ["F", "D"], "latents first")
    check_entries("indices", indices, offsets)
    check_groups(group_ends)
    leading = [] if group_ends is None else [group_ends.shape[0]]
    tokens = checks.n_tokens(indices, offsets)
    checks.shape("grad", grad, [*leading, tokens, W.shape[1]], "a row per token")
    checks.dtype("W_dec", W, checks.OPERAND_DTYPES)
    checks.dtype("grad", grad, (checks.accumulator(W.dtype),))
    checks.indices("indices", indices)
    checks.same_device(grad=grad, indices=indices, W_dec=W, group_ends=group_ends, offsets=offsets)


def _fake(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> torch.Tensor:
    return grad.new_empty(indices.shape)


code_grad = Operator(
    "code_grad(Tensor grad, Tensor indices, Tensor W, Tensor? group_ends, Tensor? offsets,"
    " str backend) -> Tensor",
    _check,
    _fake,
    dtype_of=2,
)
