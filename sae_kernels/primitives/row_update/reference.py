"""row_update in plain torch: the specification."""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.row_grad.reference import add_term
from sae_kernels.primitives.terms import Gradient


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
        norms = param.norm(dim=1)
        scale = torch.where(norms > 0, gradient.row_coef / norms, 0)
        out += scale[:, None] * param
        touched |= gradient.row_coef != 0
    return out, touched


def projected(param: torch.Tensor, grad: torch.Tensor, slices: int) -> torch.Tensor:
    """The gradient without its part along each unit slice."""
    w = param.unflatten(1, (slices, -1))
    g = grad.unflatten(1, (slices, -1))
    result: torch.Tensor = (g - (g * w).sum(-1, keepdim=True) * w).flatten(1)
    return result


def renormalised(param: torch.Tensor, norm: str, slices: int) -> torch.Tensor:
    """The rows after the norm policy."""
    w = param.unflatten(1, (slices, -1))
    norms = w.norm(dim=-1, keepdim=True)
    keep = ~(norms > 0) if norm == "unit" else ~(norms > 1)
    return torch.where(keep, w, w / norms).flatten(1)


def run(
    param: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    copy: torch.Tensor | None,
    *arguments: Any,
) -> None:
    """Computes the whole step densely and writes back the rows it applies to."""
    *columns, hyper, beta1, beta2, eps, norm, slices, lazy = arguments
    lr, clip, correction1, correction2, skip = hyper.tolist()
    if skip:
        return
    grad, touched = gather(param, Gradient.from_columns(*columns))
    if norm == "unit":
        grad = projected(param, grad, slices)
    grad = grad * clip
    new_m = beta1 * m + (1 - beta1) * grad
    new_v = beta2 * v + (1 - beta2) * grad * grad
    denominator = new_v.sqrt() / correction2**0.5 + eps
    new_param = param - lr / correction1 * new_m / denominator
    if norm != "none":
        new_param = renormalised(new_param, norm, slices)
    rows = touched[:, None] if lazy else torch.ones_like(touched)[:, None]
    for old, new in ((param, new_param), (m, new_m), (v, new_v)):
        old.copy_(torch.where(rows, new, old))
    if copy is not None:
        copy.copy_(torch.where(rows, param.to(copy.dtype), copy))
