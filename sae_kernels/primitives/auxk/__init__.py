"""auxk: dead latents learn to reconstruct what the living ones leave over.

With ``r = x - x_hat`` (constant; the argument is ``residual = -r``, as decode_residual gives it)
the dead latents alone encode the tokens, ``z = top_k(relu(x W_enc^T + b_enc))``, and decode without
a bias, ``e = z W_dec``. The loss (arXiv 2406.04093, A.2) is
``alpha * min(n_dead / k, 1) * sum |e - r|^2 / sum |r - mean(r)|^2``. Its gradients in the dead
latents' rows of W_enc, b_enc and W_dec come out compactly, one row per entry of ``latents``, of
which the first ``count`` are in use; rows past them mean nothing. With no dead latent or no token
the loss is 0.

Operands of products are rounded to the operand dtype, gradients among them never to fp16. A code
that rounds to 0 is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator

if TYPE_CHECKING:
    import torch


def _check(
    x: torch.Tensor,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    latents: torch.Tensor,
    count: torch.Tensor,
    k: int,
    alpha: float,
) -> None:
    checks.shape("x", x, ["B", "D"], "tokens by d_in")
    checks.shape("residual", residual, [x.shape[0], "D_out"], "a row per token")
    checks.shape("W_enc", W_enc, ["F", x.shape[1]], "latents first, as wide as x")
    width = residual.shape[1]
    checks.shape("W_dec", W_dec, [W_enc.shape[0], width], "latents first, as wide as residual")
    checks.shape("b_enc", b_enc, [W_enc.shape[0]], "one bias per latent")
    checks.shape("latents", latents, ["A"], "the dead latents")
    checks.shape("count", count, [], "how many of them are in use")
    checks.dtype("x", x, checks.OPERAND_DTYPES)
    checks.dtype("W_enc", W_enc, (x.dtype,))
    checks.dtype("W_dec", W_dec, checks.OPERAND_DTYPES)
    high = checks.accumulator(x.dtype)
    for name, tensor in (("residual", residual), ("b_enc", b_enc)):
        checks.dtype(name, tensor, (high,))
    checks.indices("latents", latents)
    checks.indices("count", count)
    checks.same_device(x=x, residual=residual, W_enc=W_enc, W_dec=W_dec, latents=latents)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")


def _fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    latents: torch.Tensor,
    count: torch.Tensor,
    k: int,
    alpha: float,
) -> tuple[torch.Tensor, ...]:
    A = latents.shape[0]
    dW_enc = residual.new_empty((A, x.shape[1]))
    dW_dec = residual.new_empty((A, residual.shape[1]))
    return residual.new_empty(()), dW_enc, dW_enc.new_empty(A), dW_dec


auxk = Operator(
    "auxk(Tensor x, Tensor residual, Tensor W_enc, Tensor b_enc, Tensor W_dec, Tensor latents,"
    " Tensor count, SymInt k, float alpha, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _check,
    _fake,
)
