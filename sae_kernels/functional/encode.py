"""Encoders: the product with W_enc fused with the selection of the latents to keep."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.functional.entries import jumprelu
from sae_kernels.functional.recording import autocast_dtype, refuse_double_backward, warn_of_copies
from sae_kernels.functional.route import RoutedCodes, Routing
from sae_kernels.primitives import checks
from sae_kernels.primitives.decode import decode as decode_rows
from sae_kernels.primitives.operator import recorded
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.select_batch_topk import select_batch_topk
from sae_kernels.primitives.select_threshold import select_threshold
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.select_topk_routed import select_topk_routed


@overload
def encode_topk(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    *,
    b_dec: torch.Tensor | None = ...,
    relu: bool = ...,
    rank_scale: torch.Tensor | None = ...,
    by_magnitude: bool = ...,
    routing: None = ...,
    narrow: torch.Tensor | None = ...,
    compute_dtype: torch.dtype | None = ...,
    backend: str | None = ...,
) -> SparseCodes: ...
@overload
def encode_topk(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    *,
    b_dec: torch.Tensor | None = ...,
    relu: bool = ...,
    rank_scale: None = ...,
    routing: Routing,
    narrow: torch.Tensor | None = ...,
    compute_dtype: torch.dtype | None = ...,
    backend: str | None = ...,
) -> RoutedCodes: ...
def encode_topk(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: int,
    *,
    b_dec: torch.Tensor | None = None,
    relu: bool = True,
    rank_scale: torch.Tensor | None = None,
    by_magnitude: bool = False,
    routing: Routing | None = None,
    narrow: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> SparseCodes:
    """Encodes tokens into their k largest latents (TopK SAE, Gao et al., arXiv 2406.04093).

    ``h = (x - b_dec) W_enc^T + b_enc``; kept are the first k of ``h * rank_scale``, or of its
    magnitude (largest first, ties to the lower latent, NaN first), with values ``relu(h)`` or
    ``h``. The [B, F] matrix h of more than 16 tokens is never stored.

    Args:
        x: [..., D].
        W_enc: [F, D], row after row: a transposed view is copied at every call, which a warning
            says once.
        b_enc: [F] or None.
        k: latents kept per token, 1 to F.
        b_dec: [D], subtracted from x first; or None.
        relu: zero the kept values that are not positive. They keep their index, get no gradient
            and do not count as fired; whether ReLU acts before or after the selection then makes
            no difference to any value, gradient or count.
        rank_scale: [F], multiplies h for ranking only (SAELens ranks by the decoder norm); no
            gradient flows into it.
        by_magnitude: rank by ``|h * rank_scale|`` (AbsTopK, arXiv 2510.00404); values keep their
            sign, with ``relu=False``.
        routing: from :func:`route_top1`: the latents are divided equally among E experts, and a
            token is encoded by its own expert's alone, at 1/E of the cost (k is at most F/E).
            Values are not multiplied by the gates. Not together with rank_scale or by_magnitude.
        narrow: :func:`~sae_kernels.primitives.narrow.narrowed` of W_enc, for weights that stay as
            they are: on the CPU 16 tokens or fewer then read a quarter of the bytes, with the same
            results.
        compute_dtype: of the operands of the product; sums and values are fp32 (fp64 for fp64).
            Default: the autocast dtype inside autocast, else the dtype of W_enc.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        SparseCodes with values and indices [..., k], largest first; with a routing, RoutedCodes.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or k that do not fit, named in the message.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> codes = encode_topk(x, W_enc, None, k=2)
        >>> codes.values.tolist(), codes.indices.tolist()
        ([[3.0, 2.0]], [[2, 1]])
    """
    checks.same_device(x=x, rank_scale=rank_scale)
    call = _call(x, W_enc, b_enc, b_dec, compute_dtype, backend, narrow)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if routing is not None and (rank_scale is not None or by_magnitude):
        raise ValueError("rank_scale, by_magnitude: expected neither with a routing, got one")
    rule = ("topk", relu, k, rank_scale, by_magnitude, routing)
    values, indices, _ = recorded(_Encode, *call.tensors, rule, call)
    if x.dim() != 2:
        shape = (*x.shape[:-1], k)
        values, indices = values.reshape(shape), indices.reshape(shape)
    parts = (values, indices, W_enc.shape[0])
    return SparseCodes(*parts) if routing is None else RoutedCodes(*parts, routing=routing)


def encode_threshold(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    threshold: torch.Tensor | float,
    *,
    b_dec: torch.Tensor | None = None,
    narrow: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> SparseCodes:
    """Encodes tokens into all latents above a threshold; with threshold 0, a ReLU encoder.

    ``h = (x - b_dec) W_enc^T + b_enc``; kept is every h that is not ``<= threshold`` (NaN too).

    Args:
        x, W_enc, b_enc, b_dec, narrow, compute_dtype, backend: as of :func:`encode_topk`.
        threshold: [F], or one for all latents; no gradient flows into it (but see
            :func:`encode_jumprelu`).

    Returns:
        Ragged SparseCodes with values h. Waits for the device to learn their number.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named in the message.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [-1.0, -1.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> codes = encode_threshold(x, W_enc, None, 1.5)
        >>> codes.values.tolist(), codes.indices.tolist(), codes.offsets.tolist()
        ([2.0, 3.0], [1, 2], [0, 2, 2])
    """
    call = _call(x, W_enc, b_enc, b_dec, compute_dtype, backend, narrow)
    if not isinstance(threshold, torch.Tensor):
        threshold = torch.as_tensor(threshold, device=x.device)
    bounds = threshold.detach()
    if bounds.dim() == 0:
        bounds = bounds.expand(W_enc.shape[0])
    checks.shape("threshold", bounds, [W_enc.shape[0]], "one per latent, or one for all")
    checks.same_device(x=x, threshold=bounds)
    return _ragged(x, W_enc, call, ("threshold", bounds.to(call.accumulator)))


def encode_jumprelu(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    threshold: torch.Tensor,
    *,
    bandwidth: float = 0.0,
    b_dec: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> SparseCodes:
    """Encodes tokens by JumpReLU, ``h * 1[h > threshold]`` (arXiv 2407.14435).

    The threshold's gradient is a straight-through estimate with a rectangular kernel: from entries
    within half the bandwidth of the threshold. Those below it are in the codes as dropped entries,
    with value 0.

    Args:
        x, W_enc, b_enc, b_dec, compute_dtype, backend: as of :func:`encode_topk`.
        threshold: [F]; keep it in fp32 with bf16 weights too, or small updates round away.
        bandwidth: width of the kernel; 0 for inference.

    Returns:
        Ragged SparseCodes, differentiable in x, W_enc, b_enc and threshold.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named in the message.

    Example:
        >>> x, W_enc = torch.tensor([[1.0]]), torch.tensor([[1.0], [2.0], [3.0]])
        >>> codes = encode_jumprelu(x, W_enc, None, torch.full((3,), 2.1), bandwidth=0.4)
        >>> codes.values.tolist(), codes.indices.tolist()
        ([0.0, 3.0], [1, 2])
    """
    checks.shape("threshold", threshold, [W_enc.shape[0]], "one per latent")
    lower = threshold.detach() - bandwidth / 2
    preacts = encode_threshold(
        x, W_enc, b_enc, lower, b_dec=b_dec, compute_dtype=compute_dtype, backend=backend
    )
    return jumprelu(preacts, threshold, bandwidth, backend=backend)


def encode_batch_topk(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    k: float,
    *,
    b_dec: torch.Tensor | None = None,
    rank_scale: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> SparseCodes:
    """Keeps the int(k B) largest positive pre-activations of B tokens (arXiv 2412.06410).

    Args:
        x, W_enc, b_enc, b_dec, rank_scale, compute_dtype, backend: as of :func:`encode_topk`; the
            batch is all leading dimensions of x together.
        k: latents per token on average, more than 0 and at most F; may be a fraction.
        start: scalar tensor, a guess of the smallest kept ``h * rank_scale``; it saves work and
            does not change the result. A number that is not positive and finite is no guess.

    Returns:
        Ragged SparseCodes of exactly min(int(k B), positives) entries, ties to the lower token and
        then the lower latent; values are h, all positive (or NaN).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or k that do not fit, named in the message.

    Example:
        >>> x, W_enc = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0], [3.0]])
        >>> codes = encode_batch_topk(x, W_enc, None, k=1.5)
        >>> codes.values.tolist(), codes.offsets.tolist()
        ([3.0, 4.0, 6.0], [0, 1, 3])
    """
    checks.same_device(x=x, rank_scale=rank_scale)
    call = _call(x, W_enc, b_enc, b_dec, compute_dtype, backend)
    if not isinstance(k, (int, float)) or isinstance(k, bool) or not 0 < k <= W_enc.shape[0]:
        raise ValueError(f"k: expected 0 < k <= n_latents = {W_enc.shape[0]}, got {k!r}")
    count = int(k * call.tensors[0].shape[0])
    return _ragged(x, W_enc, call, ("batch_topk", count, rank_scale, start))


class _Call(NamedTuple):
    """The checked arguments that all encoders share."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # centred x [B, D], W, b
    dtype: torch.dtype
    backend: str | None
    narrow: torch.Tensor | None = None

    @property
    def accumulator(self) -> torch.dtype:
        return checks.accumulator(self.dtype)


def _call(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor | None,
    b_dec: torch.Tensor | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
    narrow: torch.Tensor | None = None,
) -> _Call:
    for name, tensor in (("x", x), ("W_enc", W_enc), ("b_enc", b_enc), ("b_dec", b_dec)):
        checks.dtype(name, tensor, checks.OPERAND_DTYPES)
    checks.same_device(x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    dtype = compute_dtype or autocast_dtype(x) or W_enc.dtype
    if dtype not in checks.OPERAND_DTYPES:
        checks.dtype("compute_dtype", torch.empty(0, dtype=dtype), checks.OPERAND_DTYPES)
    if narrow is not None and W_enc.dtype != dtype:
        raise ValueError(
            f"narrow: expected W_enc in the dtype of the product, {dtype}, got {W_enc.dtype}; "
            "narrow rows bound those that they were made from"
        )
    checks.shape("W_enc", W_enc, ["F", "D"], "latents first")
    if not W_enc.is_contiguous():
        warn_of_copies("W_enc", W_enc, stacklevel=4)
    checks.shape("b_enc", b_enc, [W_enc.shape[0]], "one bias per latent")
    checks.as_wide_as(x, W_enc, "W_enc")
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected at least one input (D >= 1), got shape {list(x.shape)}")
    checks.shape("b_dec", b_dec, [W_enc.shape[1]], "one bias per input")
    centred = x if b_dec is None else x - b_dec
    rows = centred if centred.dim() == 2 else centred.reshape(-1, x.shape[-1])
    return _Call((rows, W_enc, b_enc), dtype, backend, narrow)


def _ragged(
    x: torch.Tensor, W_enc: torch.Tensor, call: _Call, rule: tuple[Any, ...]
) -> SparseCodes:
    values, indices, offsets = recorded(_Encode, *call.tensors, rule, call)
    leading = None if x.dim() == 2 else tuple(x.shape[:-1])
    return SparseCodes(values, indices, W_enc.shape[0], offsets, leading)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        rule: tuple[Any, ...],
        call: _Call,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        operands = (x.to(call.dtype), W.to(call.dtype), _as(b, call.accumulator))
        name, *arguments = rule
        backend, narrow = call.backend, call.narrow
        if name == "topk":
            relu, k, rank_scale, by_magnitude, routing = arguments
            if routing is None:
                scale = _as(rank_scale, call.accumulator)
                ranked_by = (_as(rank_scale, call.accumulator), narrow, by_magnitude)
                values, indices = select_topk(*operands, k, *ranked_by, backend=backend)
            else:
                routes = (routing.tokens, routing.starts)
                values, indices = select_topk_routed(*operands, k, *routes, narrow, backend=backend)
            return values.relu() if relu else values, indices, None
        if name == "threshold":
            ragged = select_threshold(*operands, arguments[0], narrow, backend=backend)
        else:
            count, rank_scale, start = arguments
            scale = _as(rank_scale, call.accumulator)
            ragged = select_batch_topk(*operands, count, scale, start, backend=backend)
        values, indices, offsets = ragged
        return values, indices, offsets

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, W, b, rule, ctx.call = inputs
        values, indices, offsets = output
        ctx.mark_non_differentiable(indices, *([] if offsets is None else [offsets]))
        ctx.set_materialize_grads(False)
        ctx.drops = rule[0] == "topk" and rule[1]
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x, W, values, indices, offsets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        refuse_double_backward()
        if grad is None:
            return (None,) * 5
        x, W, values, indices, offsets = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        dtype, backend = ctx.call.dtype, ctx.call.backend
        dh = torch.where(values == 0, 0, grad) if ctx.drops else grad.contiguous()
        dx = dW = db = None
        if needs_W or needs_b:
            codes = SparseCodes(values, indices, W.shape[0], offsets)
            order = codes.latent_order(drop_zeros=ctx.drops, backend=backend)
            if needs_W:
                term = order.term(dh, x.to(dtype))
                dW = row_grad([term], *W.shape, backend=backend)[0].to(W.dtype)
            if needs_b:
                db = row_grad([order.term(dh, None)], W.shape[0], 1, backend=backend)[0]
                db = db.flatten().to(ctx.b_dtype)
        if needs_x:
            rows_of_W = W.to(dtype)
            dx = decode_rows(dh, indices, rows_of_W, None, None, offsets, backend=backend)
            dx = dx.to(x.dtype)
        return dx, dW, db, None, None


def _as(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)
