"""Some latents alone: their pre-activations, without a product with the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.functional.encode import encode_topk
from sae_kernels.primitives import checks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def preactivations(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    latents: Sequence[int] | torch.Tensor,
    *,
    b_dec: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Computes the pre-activations of some latents: columns of ``(x - b_dec) W_enc^T + b_enc``.

    Only their rows of W_enc are read. They are what the encoders select from, on the CPU bit for
    bit: comparing them with a threshold says whether a latent fires.

    Args:
        x, W_enc, b_enc, b_dec, compute_dtype, backend: as of :func:`encode_topk`.
        latents: n indices from 0 to F - 1, in any order, repeated or not. A tensor is read by the
            host.

    Returns:
        [..., n], fp32 (fp64 for fp64), differentiable in x, W_enc and b_enc.

    Raises:
        ValueError, TypeError: as :func:`encode_topk`; latents that are no list of integers, or
            outside [0, F).

    Example:
        >>> import torch
        >>> x, W_enc = torch.ones(1, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0]])
        >>> preactivations(x, W_enc, None, [2, 0]).tolist()
        [[3.0, 1.0]]
    """
    chosen = checks.latents(latents, W_enc.shape[0]).to(W_enc.device)
    if not chosen.numel():
        return x.new_empty((*x.shape[:-1], 0), dtype=checks.accumulator(W_enc.dtype))
    codes = encode_topk(
        x,
        W_enc[chosen],
        None if b_enc is None else b_enc[chosen],
        chosen.numel(),
        b_dec=b_dec,
        relu=False,
        compute_dtype=compute_dtype,
        backend=backend,
    )
    return codes.to_dense()
