"""Functions of the kept entries of codes, used between encoder and decoder.

A matrix [B, F] in a formula is a vector of its kept entries here.
"""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.functional.recording import refuse_double_backward
from sae_kernels.primitives.operator import recorded
from sae_kernels.primitives.row_grad import row_grad


def gather_by_latent(
    vector: torch.Tensor, codes: SparseCodes, *, backend: str | None = None
) -> torch.Tensor:
    """``vector[codes.indices]``: each entry's value of a per-latent vector, differentiable.

    Unlike indexing's, its gradient sums a latent's entries in a fixed order.

    Args:
        vector: fp32 or fp64 [F].
        codes: of any form.
        backend: see :mod:`sae_kernels.backends`.

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 3.0, 1.0]]), k=2)
        >>> gather_by_latent(torch.tensor([5.0, 6.0, 7.0]), codes).tolist()
        [[6.0, 7.0]]
    """
    rows = codes.offsets is None and codes.indices.dim() == 2 and len(codes.indices) > 0
    if rows and codes.indices.stride(0) == 0:
        # All tokens have the same latents (a dense tile): one row serves them all.
        return vector[codes.indices[:1].long().flatten()].expand(codes.indices.shape)
    if not vector.requires_grad:
        return vector[codes.indices.long()]
    flat = codes.flat()
    entries = recorded(_GatherByLatent, vector, flat.indices, flat.offsets, backend)
    result: torch.Tensor = entries.reshape(codes.values.shape)
    return result


def jumprelu(
    preacts: SparseCodes, threshold: torch.Tensor, bandwidth: float, *, backend: str | None = None
) -> SparseCodes:
    """JumpReLU of kept pre-activations, ``h * 1[h > threshold]``.

    Gradients after arXiv 2407.14435: ``d/dh = 1[h > threshold]`` and ``d/dthreshold =
    -(threshold / bandwidth) 1[threshold - bandwidth/2 < h < threshold + bandwidth/2]``.

    Args:
        preacts: the pre-activations above ``threshold - bandwidth / 2``.
        threshold: [F].
        bandwidth: width of the rectangular kernel.
        backend: see :mod:`sae_kernels.backends`.
    """
    thresholds = gather_by_latent(threshold, preacts, backend=backend)
    return preacts.with_values(recorded(_JumpReLU, preacts.values, thresholds, bandwidth))


def heaviside_ste(
    preacts: SparseCodes, threshold: torch.Tensor, bandwidth: float, *, backend: str | None = None
) -> torch.Tensor:
    """``1[h > threshold]`` of each kept pre-activation; their sum over a token is its L0.

    ``d/dthreshold = -(1 / bandwidth) 1[threshold - bandwidth/2 < h < threshold + bandwidth/2]`` and
    ``d/dh = 0`` (arXiv 2407.14435). Arguments as of :func:`jumprelu`; ``preacts`` must not have
    been zeroed below the threshold, as both halves of the window have a gradient.
    """
    thresholds = gather_by_latent(threshold, preacts, backend=backend)
    entries: torch.Tensor = recorded(_Heaviside, preacts.values, thresholds, bandwidth)
    return entries


def _in_window(h: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    # Computed as encode_jumprelu does, so that it keeps every entry of the window.
    return (h > threshold - bandwidth / 2) & (h < threshold + bandwidth / 2)


class _GatherByLatent(torch.autograd.Function):
    @staticmethod
    def forward(
        vector: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor | None,
        backend: str | None,
    ) -> torch.Tensor:
        return vector[indices.long()]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        vector, indices, offsets, ctx.backend = inputs
        ctx.dtype, ctx.n_latents = vector.dtype, vector.shape[0]
        ctx.save_for_backward(indices, offsets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        indices, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        # Entries of gradient 0 are dropped: few of them lie in a kernel's window.
        codes = SparseCodes(grad, indices, ctx.n_latents, offsets)
        order = codes.latent_order(backend=ctx.backend)
        total = row_grad([order.term(grad, None)], ctx.n_latents, 1, backend=ctx.backend)[0]
        return total.flatten().to(ctx.dtype), None, None, None


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(h: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        return torch.where(h <= threshold, 0, h)  # keeps NaN

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        h, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(h, threshold)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        h, threshold = ctx.saved_tensors
        dh = torch.where(h <= threshold, 0, grad)
        if not ctx.needs_input_grad[1]:
            return dh, None, None
        window = _in_window(h, threshold, ctx.bandwidth)
        slope = -threshold / ctx.bandwidth if ctx.bandwidth else torch.zeros_like(threshold)
        return dh, torch.where(window, slope * grad, 0), None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(h: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        return (~(h <= threshold)).to(h.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        h, threshold, ctx.bandwidth = inputs
        ctx.save_for_backward(h, threshold)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        h, threshold = ctx.saved_tensors
        window = _in_window(h, threshold, ctx.bandwidth)
        slope = -1 / ctx.bandwidth if ctx.bandwidth else 0.0
        return None, torch.where(window, slope * grad, 0), None
