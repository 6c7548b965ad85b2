"""The decoder: reconstructs activations from codes."""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.functional.recording import autocast_dtype, refuse_double_backward, warn_of_copies
from sae_kernels.primitives import checks
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode as decode_rows
from sae_kernels.primitives.operator import recorded
from sae_kernels.primitives.row_grad import row_grad


def decode(
    codes: SparseCodes,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor | None = None,
    *,
    group_ends: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Reconstructs tokens from codes: ``x_hat = b_dec + sum_j values_j W_dec[indices_j]``.

    Args:
        codes: of any leading shape.
        W_dec: [F, D_out], contiguous rows: a transposed view is copied at every call, with a
            warning at the first. D_out need not be d_in (transcoders).
        b_dec: [D_out] or None.
        group_ends: int32 [G], ascending, the last being F: returns the G prefix reconstructions
            of a Matryoshka SAE (arXiv 2503.17547), shape [G, ..., D_out].
        compute_dtype: the dtype that W_dec is rounded to; sums are fp32 (fp64 for fp64). Default
            as in :func:`encode_topk`. Under bfloat16 the gradients of W_dec and of the values take
            the upstream gradient rounded to it.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        [..., D_out], fp32 (fp64 for fp64).

    Raises:
        IndexError: codes with indices outside [0, F).
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named in the message.

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 3.0]]), k=1)
        >>> decode(codes, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2)).tolist()
        [[1.0, 7.0]]
    """
    if not isinstance(codes, SparseCodes):
        raise TypeError(
            f"codes: expected SparseCodes, as an encoder gives them, got {type(codes).__name__}; "
            "SparseCodes.from_dense makes them of a dense tensor"
        )
    checks.shape("W_dec", W_dec, [codes.n_latents, "D"], "one row per latent of the codes")
    if not W_dec.is_contiguous():
        warn_of_copies("W_dec", W_dec, stacklevel=3)
    dtype = compute_dtype or autocast_dtype(W_dec) or W_dec.dtype
    flat = codes.flat()
    out = recorded(
        _Decode, flat.values, flat.indices, W_dec, b_dec, group_ends, flat.offsets, dtype, backend
    )
    leading = out.shape[:-2]
    result: torch.Tensor = out.reshape(*leading, *codes.batch_shape, W_dec.shape[1])
    return result


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        values: torch.Tensor,
        indices: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        group_ends: torch.Tensor | None,
        offsets: torch.Tensor | None,
        dtype: torch.dtype,
        backend: str | None,
    ) -> torch.Tensor:
        accumulator = checks.accumulator(dtype)
        b = None if b is None else b.to(accumulator)
        out: torch.Tensor = decode_rows(
            values.to(accumulator), indices, W.to(dtype), b, group_ends, offsets, backend=backend
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        values, indices, W, b, group_ends, offsets, ctx.dtype, ctx.backend = inputs
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(values, indices, W, group_ends, offsets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        values, indices, W, group_ends, offsets = ctx.saved_tensors
        needs_values, _, needs_W, needs_b = ctx.needs_input_grad[:4]
        grad, dvalues, dW, db = grad.contiguous(), None, None, None
        if needs_b:
            db = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.b_dtype)
        if group_ends is not None:
            # A latent of group g is in prefixes g, g + 1, ...: its gradient sums theirs.
            grad = grad.flip(0).cumsum(0).flip(0).contiguous()
        accumulator = grad.dtype
        grad = grad.to(checks.gradient_operand(ctx.dtype))
        rows = W.to(ctx.dtype) if needs_values else None
        if needs_W:
            codes = SparseCodes(values.to(accumulator), indices, W.shape[0], offsets)
            dW, products = _decoder_grad(codes, grad, group_ends, W.dtype, rows, ctx.backend)
            dvalues = None if rows is None else products.view(values.shape)
        elif rows is not None:
            grad = grad.to(accumulator)
            dvalues = code_grad(grad, indices, rows, group_ends, offsets, backend=ctx.backend)
        dvalues = None if dvalues is None else dvalues.to(values.dtype)
        return dvalues, None, dW, db, None, None, None, None


def _decoder_grad(
    codes: SparseCodes,
    grad: torch.Tensor,
    group_ends: torch.Tensor | None,
    dtype: torch.dtype,
    rows: torch.Tensor | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dW_dec [F, D] from dL/dx_hat [B, D], or [G, B, D] of prefix reconstructions.

    Given the decoder's rows, one reading of dL/dx_hat gives dL/dvalues too. An entry of value 0 has
    such a gradient, so all are listed then.
    """
    order = codes.latent_order(drop_zeros=rows is None, backend=backend)
    if group_ends is not None:
        order = order.by_group(codes.indices, group_ends, grad.shape[1])
    source = grad.reshape(-1, grad.shape[-1])
    term, shape = order.term(codes.values, source), (codes.n_latents, source.shape[1])
    return row_grad([term], *shape, dtype=dtype, W=rows, backend=backend)
