"""The auxiliary loss AuxK: dead latents learn to reconstruct what the living ones leave over."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive()
def auxk(
    x: torch.Tensor,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    latents: torch.Tensor,
    count: torch.Tensor,
    k: int,
    alpha: float,
    variance: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the AuxK loss (arXiv 2406.04093, A.2) and its gradients in the dead latents' rows.

    With ``r = x - x_hat`` (constant) the dead latents alone encode the tokens,
    ``z = top_k(relu(x W_enc^T + b_enc))``, and decode without a bias, ``e = z W_dec``. The loss is
    ``alpha * min(n_dead / k, 1) * sum |e - r|^2 / sum |r - mean(r)|^2``. With no dead latent or no
    token it is 0. ``variance`` takes the place of the last sum, for rows that are not the whole
    batch. Operands of products are rounded to the operand dtype, gradients among them never
    to fp16. A code that rounds to 0 is none.

    Args:
        x: tokens [B, D] in an operand dtype.
        residual: ``-r`` [B, D_out] in the accumulator dtype.
        W_enc: encoder [F, D] in the dtype of x.
        b_enc: bias [F] in the accumulator dtype.
        W_dec: decoder [F, D_out] in an operand dtype.
        latents: int32 [A], the dead latents.
        count: int32 [], how many of them are in use.
        k: latents per token.
        alpha: the loss's coefficient.
        variance: scalar in the accumulator dtype; None is the residual's own.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        The loss [] and the gradients of W_enc [A, D], b_enc [A] and W_dec [A, D_out], a row per
        entry of ``latents``; rows past the first ``count`` mean nothing.
    """
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
    checks.shape("variance", variance, [], "what the loss is divided by")
    for name, tensor in (("residual", residual), ("b_enc", b_enc), ("variance", variance)):
        checks.dtype(name, tensor, (high,))
    checks.indices("latents", latents)
    checks.indices("count", count)
    checks.same_device(x=x, residual=residual, W_enc=W_enc, W_dec=W_dec, latents=latents)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    A = latents.shape[0]
    shapes: tuple[list[int], ...] = ([], [A, x.shape[1]], [A], [A, width])
    loss, dW_enc, db_enc, dW_dec = (result(shape, high) for shape in shapes)
    return loss, dW_enc, db_enc, dW_dec
