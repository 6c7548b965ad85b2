"""AuxK for autograd users: the loss that the primitive auxk has in closed form.

See :mod:`sae_kernels.primitives.auxk` for the formula. Gradients reach W_enc, b_enc and W_dec of
the dead latents and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.functional import encode_topk
from sae_kernels.primitives.checks import gradient_operand

if TYPE_CHECKING:
    import torch

    from sae_kernels.config.objective import ObjectiveConfig
    from sae_kernels.nn import SparseAutoencoder


def latents_per_token(sae: SparseAutoencoder, objective: ObjectiveConfig) -> int:
    """How many dead latents take part per token: unless set, half the width of a token."""
    return objective.k_aux or max(1, sae.config.input_width // 2)


class DeadRows(NamedTuple):
    """The compact matrices of the dead latents, operands in the compute dtype.

    Attributes:
        W_enc, W_dec: [A, D].
        b_enc: [A], fp32.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor


def loss(
    x_centred: torch.Tensor,
    residual: torch.Tensor,
    dead: DeadRows,
    k_aux: int,
    alpha: float,
    compute_dtype: torch.dtype,
    backend: str | None = None,
) -> torch.Tensor:
    """AuxK's loss, differentiable in the rows of ``dead`` only.

    Args:
        x_centred: [B, D], as the encoder saw it.
        residual: fp32 [B, D], ``x - x_hat``.
        dead: the dead latents' rows.
        k_aux: latents per token (at most those there are).
        alpha: the loss's coefficient.
        compute_dtype: of the operands of products.
        backend: see :mod:`sae_kernels.backends`.
    """
    n_dead = dead.W_enc.shape[0]
    codes = encode_topk(
        x_centred.detach(),
        dead.W_enc,
        dead.b_enc,
        min(k_aux, n_dead),
        compute_dtype=compute_dtype,
        backend=backend,
    )
    e = _operand(codes.to_dense(), compute_dtype) @ _operand(dead.W_dec, compute_dtype)
    residual = residual.detach()
    variance = (residual - residual.mean(0)).square().sum()
    weight = alpha * min(n_dead / k_aux, 1.0) / variance
    return weight * (e.float() - residual).square().sum()


def _operand(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to ``dtype``, in the dtype of the product; the gradient is not rounded to fp16."""
    if gradient_operand(dtype) == dtype:
        return t.to(dtype)
    return t + (t.to(dtype).to(t.dtype) - t).detach()
