"""The public differentiable functions.

Gradients are of first order: a backward pass that is itself recorded (``create_graph=True``)
raises. Shapes: B tokens (any leading dimensions), D d_in, F n_latents, K kept per token.
"""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.codes import LatentOrder, SparseCodes
from sae_kernels.primitives import checks
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode as decode_rows
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.transpose_codes import transpose_codes

__all__ = ["decode", "encode_topk"]


def encode_topk(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    *,
    b_dec: torch.Tensor | None = None,
    relu: bool = True,
    rank_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> SparseCodes:
    """Encodes tokens into their k largest latents (TopK SAE, Gao et al., arXiv 2406.04093).

    ``h = (x - b_dec) W_enc^T + b_enc``; kept are the first k of ``h * rank_scale`` (largest first,
    ties to the lower latent, NaN first), with values ``relu(h)`` or ``h``. The [B, F] matrix h is
    never stored.

    Args:
        x: [..., D].
        W_enc: [F, D].
        b_enc: [F] or None.
        k: latents kept per token, 1 to F.
        b_dec: [D], subtracted from x first; or None.
        relu: zero the kept values that are not positive. They keep their index, get no gradient
            and do not count as fired; whether ReLU acts before or after the selection then makes
            no difference to any value, gradient or count.
        rank_scale: [F], multiplies h for ranking only (SAELens ranks by the decoder norm); no
            gradient flows into it.
        compute_dtype: of the operands of the product; sums and values are fp32 (fp64 for fp64).
            Default: the autocast dtype inside autocast, else the dtype of W_enc.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        SparseCodes with values and indices [..., k], largest key first.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or k that do not fit, named in the message.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> codes = encode_topk(x, W_enc, None, k=2)
        >>> codes.values.tolist(), codes.indices.tolist()
        ([[3.0, 2.0]], [[2, 1]])
    """
    for name, tensor in (("x", x), ("W_enc", W_enc), ("b_enc", b_enc), ("b_dec", b_dec)):
        checks.dtype(name, tensor, checks.OPERAND_DTYPES)
    checks.same_device(x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec, rank_scale=rank_scale)
    dtype = compute_dtype or _autocast_dtype(x) or W_enc.dtype
    checks.dtype("compute_dtype", torch.empty(0, dtype=dtype), checks.OPERAND_DTYPES)
    checks.shape("W_enc", W_enc, ["F", "D"], "latents first")
    checks.shape("b_enc", b_enc, [W_enc.shape[0]], "one bias per latent")
    if x.dim() < 1 or x.shape[-1] != W_enc.shape[1]:
        raise ValueError(
            f"x: expected shape [..., {W_enc.shape[1]}] (as wide as W_enc), got {list(x.shape)}"
        )
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one input (D >= 1), got shape {list(x.shape)}")
    checks.shape("b_dec", b_dec, [W_enc.shape[1]], "one bias per input")
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    centred = x if b_dec is None else x - b_dec
    values, indices = _EncodeTopk.apply(
        centred.reshape(-1, x.shape[-1]), W_enc, b_enc, rank_scale, k, relu, dtype, backend
    )
    shape = (*x.shape[:-1], k)
    return SparseCodes(values.reshape(shape), indices.reshape(shape), W_enc.shape[0])


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
        codes: of any leading shape; indices outside [0, F) raise IndexError.
        W_dec: [F, D_out]; D_out need not be d_in (transcoders).
        b_dec: [D_out] or None.
        group_ends: int32 [G], ascending, the last being F: returns the G prefix reconstructions
            of a Matryoshka SAE (arXiv 2503.17547), shape [G, ..., D_out].
        compute_dtype: the dtype in which W_dec is read; sums are fp32 (fp64 for fp64). Default as
            in :func:`encode_topk`.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        [..., D_out] in the accumulator dtype, fp32 (or fp64).

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 3.0]]), k=1)
        >>> decode(codes, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2)).tolist()
        [[1.0, 7.0]]
    """
    checks.shape("W_dec", W_dec, [codes.n_latents, "D"], "one row per latent of the codes")
    dtype = compute_dtype or _autocast_dtype(W_dec) or W_dec.dtype
    out = _Decode.apply(
        codes.values.reshape(-1, codes.k),
        codes.indices.reshape(-1, codes.k),
        W_dec,
        b_dec,
        group_ends,
        dtype,
        backend,
    )
    leading = out.shape[:-2]
    result: torch.Tensor = out.reshape(*leading, *codes.values.shape[:-1], W_dec.shape[1])
    return result


def _autocast_dtype(like: torch.Tensor) -> torch.dtype | None:
    device = like.device.type
    if like.dtype == torch.float64 or device == "meta":
        return None  # autocast leaves fp64 alone everywhere and knows no meta device
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _refuse_double_backward() -> None:
    # once_differentiable would hide this: under a linear loss it returns constant gradients.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "sae_kernels has first-order gradients only: expected a backward pass without "
            "create_graph=True"
        )


class _EncodeTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        rank_scale: torch.Tensor | None,
        k: int,
        relu: bool,
        dtype: torch.dtype,
        backend: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        accumulator = checks.accumulator(dtype)
        b = None if b is None else b.to(accumulator)
        rank_scale = None if rank_scale is None else rank_scale.to(accumulator)
        values, indices = select_topk(x.to(dtype), W.to(dtype), b, k, rank_scale, backend=backend)
        return values.relu() if relu else values, indices

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, W, b, _, _, ctx.relu, ctx.dtype, ctx.backend = inputs
        values, indices = output
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x, W, values, indices)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        _refuse_double_backward()
        if grad is None:
            return (None,) * 8
        x, W, values, indices = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        backend = ctx.backend
        dh = torch.where(values == 0, 0, grad) if ctx.relu else grad.contiguous()
        dx = dW = db = None
        if needs_W or needs_b:
            kept = values if ctx.relu else None
            order = LatentOrder(*transpose_codes(indices, kept, None, W.shape[0], backend=backend))
            if needs_W:
                term = order.term(dh, x.to(ctx.dtype))
                dW = row_grad([term], *W.shape, backend=backend).to(W.dtype)
            if needs_b:
                db = row_grad([order.term(dh, None)], W.shape[0], 1, backend=backend)
                db = db.flatten().to(ctx.b_dtype)
        if needs_x:
            dx = decode_rows(dh, indices, W.to(ctx.dtype), None, None, backend=backend)
            dx = dx.to(x.dtype)
        return dx, dW, db, None, None, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        values: torch.Tensor,
        indices: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        group_ends: torch.Tensor | None,
        dtype: torch.dtype,
        backend: str | None,
    ) -> torch.Tensor:
        accumulator = checks.accumulator(dtype)
        b = None if b is None else b.to(accumulator)
        out: torch.Tensor = decode_rows(
            values.to(accumulator), indices, W.to(dtype), b, group_ends, backend=backend
        )
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        values, indices, W, b, group_ends, ctx.dtype, ctx.backend = inputs
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(values, indices, W, group_ends)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        _refuse_double_backward()
        values, indices, W, group_ends = ctx.saved_tensors
        needs_values, _, needs_W, needs_b = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        dvalues = dW = db = None
        if needs_b:
            db = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.b_dtype)
        if group_ends is not None:
            # A latent of group g is in the prefixes g, g + 1, ...: its gradient is their sum.
            grad = grad.flip(0).cumsum(0).flip(0).contiguous()
        if needs_values:
            dvalues = code_grad(grad, indices, W.to(ctx.dtype), group_ends, backend=ctx.backend)
            dvalues = dvalues.to(values.dtype)
        if needs_W:
            dW = _decoder_grad(values, indices, grad, W.shape, group_ends, ctx.backend)
            dW = dW.to(W.dtype)
        return dvalues, None, dW, db, None, None, None


def _decoder_grad(
    values: torch.Tensor,
    indices: torch.Tensor,
    grad: torch.Tensor,
    shape: torch.Size,
    group_ends: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    values = values.to(grad.dtype)
    row_ids = None
    if group_ends is not None:
        group = torch.bucketize(indices, group_ends, right=True, out_int32=True)
        tokens = torch.arange(indices.shape[0], dtype=torch.int32, device=indices.device)
        row_ids = group * indices.shape[0] + tokens[:, None]
    order = LatentOrder(*transpose_codes(indices, values, row_ids, shape[0], backend=backend))
    source = grad.reshape(-1, shape[1])
    return row_grad([order.term(values, source)], *shape, backend=backend)
