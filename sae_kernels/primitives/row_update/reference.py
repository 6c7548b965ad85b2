"""row_update in plain torch: the specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.row_grad.reference import add_term
from sae_kernels.primitives.row_update import halves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.primitives.row_update import AdamMatrix
    from sae_kernels.primitives.terms import Gradient


def whole(param: torch.Tensor, high: torch.Tensor | None) -> torch.Tensor:
    """The weights themselves, from their halves if ``param`` holds the low ones."""
    if high is None or param.dtype != torch.int16:
        return param
    return halves.joined(high, param)


def gather(param: torch.Tensor, gradient: Gradient) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense gradient [F, width] and which rows have any entry [F]."""
    out = torch.zeros_like(param)
    touched = torch.zeros(param.shape[0], dtype=torch.bool, device=param.device)
    for term in gradient.terms:
        add_term(out, term)
        touched |= term.offsets.diff() > 0
    if gradient.dense is not None and gradient.dense_latents is not None:
        latents = gradient.dense_latents
        checks.latents_in_range(latents, param.shape[0], "dense_latents", lowest=-1)
        used = latents >= 0
        latents = latents[used].long()
        out.index_add_(0, latents, gradient.dense[used])
        touched[latents] = True
    if gradient.row_coef is not None:
        coef = gradient.row_coef.view(param.shape[0], gradient.row_parts)
        parts = param.unflatten(1, (gradient.row_parts, -1))
        norms = parts.norm(dim=2)
        scale = torch.where(norms > 0, coef / norms, 0)
        out += (scale[..., None] * parts).flatten(1)
        touched |= (coef != 0).any(1)
    return out, touched


def projected(param: torch.Tensor, grad: torch.Tensor, slices: int) -> torch.Tensor:
    """The gradient without its part along each unit slice."""
    w = param.unflatten(1, (slices, -1))
    g = grad.unflatten(1, (slices, -1))
    result: torch.Tensor = (g - (g * w).sum(-1, keepdim=True) * w).flatten(1)
    return result


def renormalised(param: torch.Tensor, norm: str, slices: int) -> torch.Tensor:
    """The rows after the norm policy was applied to each slice."""
    w = param.unflatten(1, (slices, -1))
    norms = w.norm(dim=-1, keepdim=True)
    keep = ~(norms > 0) if norm == "unit" else ~(norms > 1)
    return torch.where(keep, w, w / norms).flatten(1)


def noise(step: int, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """32 random bits per element in int64: the lower half is for m, the upper one for v."""
    latents, columns = (torch.arange(n, device=device) for n in shape)
    key = _mixed(latents ^ _mixed(torch.tensor(step, device=device)))
    return _mixed(columns ^ key[:, None])


def _mixed(x: torch.Tensor) -> torch.Tensor:
    # An integer hash of low bias (github.com/skeeto/hash-prospector), uint32 held in int64.
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def run(
    matrix: AdamMatrix,
    gradient: Gradient,
    hyper: torch.Tensor,
    betas: Sequence[float],
    eps: float,
    norm: str,
    slices: int,
    lazy: bool,
) -> None:
    """Computes the whole step densely and writes back the rows it applies to."""
    (param, m, v, copy), (beta1, beta2) = matrix, betas
    lr, clip, correction1, correction2, skip, step = hyper.tolist()
    if skip:
        return
    master = whole(param, copy)
    grad, touched = gather(master, gradient)
    if norm == "unit":
        grad = projected(master, grad, slices)
    grad = grad * clip
    new_m = beta1 * m.to(grad.dtype) + (1 - beta1) * grad
    new_v = beta2 * v.to(grad.dtype) + (1 - beta2) * grad * grad
    denominator = new_v.sqrt() / correction2**0.5 + eps
    new_param = master - lr / correction1 * new_m / denominator
    if norm != "none":
        new_param = renormalised(new_param, norm, slices)
    if m.dtype == torch.bfloat16:
        bits = noise(int(step), m.shape, m.device)
        new_m, new_v = halves.cut(new_m, bits & 0xFFFF), halves.cut(new_v, bits >> 16)
    high = new_param
    if param.dtype == torch.int16:
        high, new_param = halves.split(new_param)
    rows = touched[:, None] if lazy else torch.ones_like(touched)[:, None]
    for old, new in ((param, new_param), (m, new_m), (v, new_v), (copy, high)):
        if old is not None:
            old.copy_(torch.where(rows, new.to(old.dtype), old))
