"""decode_residual: decode, compare and differentiate in one visit of the decoder rows.

``e = x_hat - target``, ``sse = sum_d e^2`` per token and ``code_grad[j] = <e, W_dec[indices[j]]>``,
so the loss ``c * sum(sse)`` has the code gradients ``2 c * code_grad``. With ``drop_zeros`` (codes
after a ReLU) an entry of value 0 is a dropped one and its gradient is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives import checks
from sae_kernels.primitives.decode import check_codes
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
) -> None:
    check_codes(values, indices, W)
    checks.shape("b_dec", b_dec, [W.shape[1]], "one bias per output")
    checks.shape("target", target, [values.shape[0], W.shape[1]], "tokens by outputs")
    checks.dtype("b_dec", b_dec, (values.dtype,))
    checks.dtype("target", target, (values.dtype,))
    checks.same_device(values=values, indices=indices, W_dec=W, b_dec=b_dec, target=target)


def _fake(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    drop_zeros: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        values.new_empty((values.shape[0], W.shape[1])),
        values.new_empty((values.shape[0],)),
        values.new_empty(values.shape),
    )


decode_residual = Operator(
    "decode_residual(Tensor values, Tensor indices, Tensor W, Tensor? b_dec, Tensor target,"
    " bool drop_zeros, str backend) -> (Tensor, Tensor, Tensor)",
    _check,
    _fake,
    dtype_of=2,
)
