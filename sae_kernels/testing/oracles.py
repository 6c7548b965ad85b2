"""Oracles of the primitives: dense, in fp64, straight from the formulas.

They share nothing with the reference backend: a [B, F] matrix is built, multiplied and sorted, so
that no mistake of a sparse algorithm is made twice. Shapes: B tokens, D d_in,
F n_latents, K kept per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Scores(NamedTuple):
    """The encoder's scores in fp64.

    Attributes:
        h: [B, F], ``x W^T + b``, never -0.
        key: [B, F], the ranking key ``h * rank_scale``, or its magnitude.
        magnitude: [B, F], the sum of the absolute terms of h: what its rounding error scales with.
    """

    h: torch.Tensor
    key: torch.Tensor
    magnitude: torch.Tensor


def scores(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    rank_scale: torch.Tensor | None = None,
    by_magnitude: bool = False,
) -> Scores:
    """Every score of every token."""
    x, W = x.double(), W.double()
    h = x @ W.T
    magnitude = x.abs() @ W.abs().T
    if b is not None:
        h = h + b.double()
        magnitude = magnitude + b.double().abs()
    h = h + 0.0
    key = h if rank_scale is None else h * rank_scale.double() + 0.0
    return Scores(h, key.abs() if by_magnitude else key, magnitude)


def selection(key: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [B, k]: key descending, equal keys by latent ascending, NaN before everything."""
    is_nan = key.isnan()
    by_key = (-key.masked_fill(is_nan, 0.0)).argsort(dim=1, stable=True)
    nan_first = (~is_nan.gather(1, by_key)).to(torch.int8).argsort(dim=1, stable=True)
    return by_key.gather(1, nan_first)[:, :k]


def of_experts(exact: Scores, experts: torch.Tensor, n_experts: int) -> Scores:
    """[B, F / n_experts] each: every token's scores of the latents of its own expert."""
    token = torch.arange(experts.shape[0])
    parts = (t.unflatten(1, (n_experts, -1))[token, experts.long()] for t in exact)
    return Scores(*parts)


def routes(experts: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens by expert, int32 [B], and where each expert's start, int32 [n_experts + 1]."""
    own = [(experts == e).nonzero()[:, 0] for e in range(n_experts)]
    ends = torch.tensor([0, *(t.shape[0] for t in own)]).cumsum(0)
    return torch.cat(own).int(), ends.int()


class Ragged(NamedTuple):
    """Ragged codes: values and int32 indices [N], and int32 offsets [B + 1] of the tokens."""

    values: torch.Tensor
    indices: torch.Tensor
    offsets: torch.Tensor


def above(h: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """bool [B, F]: the scores that are not ``<=`` their latent's bound; any with a NaN is not."""
    return ~(h <= bounds.to(h.dtype))


def batch_topk(h: torch.Tensor, key: torch.Tensor, count: int) -> torch.Tensor:
    """bool [B, F]: the first ``count`` entries of the batch by key, of those positive in both.

    Equal keys by token, then latent, ascending; NaN counts as positive and comes first.
    """
    positive = above(h, torch.zeros(())) & above(key, torch.zeros(()))
    order = selection(key.masked_fill(~positive, -torch.inf).reshape(1, -1), key.numel())[0]
    kept = torch.zeros(key.numel(), dtype=torch.bool)
    kept[order[: min(count, int(positive.sum()))]] = True
    return kept.view(key.shape)


def ragged(h: torch.Tensor, kept: torch.Tensor) -> Ragged:
    """The codes of the kept entries of [B, F], token by token in latent order."""
    ends = kept.sum(1).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return Ragged(h[kept], kept.nonzero()[:, 1].int(), offsets.int())


def tokens(indices: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """int64 like the indices of codes, [B, K] or ragged: each entry's token."""
    if offsets is None:
        return torch.arange(indices.shape[0])[:, None].expand_as(indices)
    return torch.searchsorted(offsets[1:].long(), torch.arange(indices.shape[0]), right=True)


def dense_codes(
    values: torch.Tensor, indices: torch.Tensor, n_latents: int, offsets: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, F] in fp64 with the values in place and zeros elsewhere."""
    n_tokens = values.shape[0] if offsets is None else offsets.shape[0] - 1
    dense = torch.zeros(n_tokens, n_latents, dtype=torch.float64)
    dense[tokens(indices, offsets), indices.long()] = values.double()
    return dense


def prefix_masks(group_ends: torch.Tensor | None, n_latents: int) -> torch.Tensor:
    """bool [G, F]: which latents the g-th prefix reconstruction sums."""
    ends = torch.tensor([n_latents]) if group_ends is None else group_ends.long()
    return torch.arange(n_latents)[None] < ends[:, None]


def decode(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None = None,
    group_ends: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reconstructions and the sums of their absolute terms: [B, D], or [G, B, D] in groups."""
    dense, W = dense_codes(values, indices, W.shape[0], offsets), W.double()
    masks = prefix_masks(group_ends, W.shape[0])
    out = torch.stack([_product(dense * mask, W) for mask in masks])
    magnitude = torch.stack([_product((dense * mask).abs(), W.abs()) for mask in masks])
    if b_dec is not None:
        out, magnitude = out + b_dec.double(), magnitude + b_dec.double().abs()
    return (out[0], magnitude[0]) if group_ends is None else (out, magnitude)


def code_grad(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dvalues, like the codes, from dL/dx_hat and the sums of its absolute terms.

    In groups ``grad`` is [G, B, D] and a latent takes the row of the first group that holds it.
    """
    grad, W = grad.double(), W.double()
    if group_ends is None:
        grad = grad[None]
    first_group = (~prefix_masks(group_ends, W.shape[0])).sum(0)  # [F]
    group = first_group[indices.long()]
    everything = grad @ W.T, grad.abs() @ W.abs().T  # each [G, B, F]
    token = tokens(indices, offsets)
    value, magnitude = (t[group, token, indices.long()] for t in everything)
    return value, magnitude


def suffix_sums(parts: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """[G, ...]: in the place of each part the weighted sum of it and of those after it."""
    factors = [1.0] * len(parts) if weights is None else weights.double().tolist()
    weighted = [factor * part for factor, part in zip(factors, parts.double(), strict=True)]
    return torch.stack([torch.stack(weighted[g:]).sum(0) for g in range(len(parts))])


class EncodeGrads(NamedTuple):
    """Gradients of the encoder and, for each, the sum of its absolute terms."""

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    x_magnitude: torch.Tensor
    W_magnitude: torch.Tensor
    b_magnitude: torch.Tensor


def encode_grads(
    dvalues: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    x: torch.Tensor,
    W: torch.Tensor,
    *,
    relu: bool,
) -> EncodeGrads:
    """Gradients of ``values`` with respect to x, W_enc and b_enc."""
    x, W = x.double(), W.double()
    kept = torch.where(values == 0, 0.0, dvalues.double()) if relu else dvalues
    dh = dense_codes(kept, indices, W.shape[0])
    return EncodeGrads(
        _product(dh, W),
        dh.T @ x,
        dh.sum(0),
        _product(dh.abs(), W.abs()),
        dh.abs().T @ x.abs(),
        dh.abs().sum(0),
    )


class AdamState(NamedTuple):
    """A matrix and its Adam moments in fp64, all [F, width]."""

    param: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor


def row_penalty(param: torch.Tensor, row_coef: torch.Tensor) -> torch.Tensor:
    """The gradient of ``sum_s row_coef[f, s] |w_fs|`` over S equal parts of a row; 0 at 0.

    A row_coef [F] is one of a single part.
    """
    coef = row_coef.double().reshape(param.shape[0], -1)
    out = torch.zeros_like(param, dtype=torch.float64)
    width = param.shape[1] // coef.shape[1]
    for s in range(coef.shape[1]):
        part = slice(s * width, (s + 1) * width)
        rows = param[:, part].double()
        lengths = rows.square().sum(1).sqrt()
        unit = rows / torch.where(lengths > 0, lengths, 1.0)[:, None]
        out[:, part] = coef[:, s, None] * unit
    return out


def projected(param: torch.Tensor, grad: torch.Tensor, slices: int) -> torch.Tensor:
    """The gradient without its component along each slice of its row (taken to be unit)."""
    out = grad.clone()
    width = param.shape[1] // slices
    for s in range(slices):
        part = slice(s * width, (s + 1) * width)
        along = (grad[:, part] * param[:, part]).sum(1, keepdim=True)
        out[:, part] -= along * param[:, part]
    return out


def row_update(
    state: AdamState,
    grad: torch.Tensor,
    hyper: torch.Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    norm: str = "none",
    slices: int = 1,
) -> AdamState:
    """One dense step for the whole gradient [F, width]; the caller picks the rows it applies to."""
    lr, clip, correction1, correction2, skip, _ = hyper.double().tolist()
    if skip:
        return state
    param, m, v = (t.double() for t in state)
    grad = grad.double()
    if norm == "unit":
        grad = projected(param, grad, slices)
    grad = clip * grad
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad**2
    param = param - lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    if norm != "none":
        width = param.shape[1] // slices
        for part in (slice(s * width, (s + 1) * width) for s in range(slices)):
            for row in param[:, part]:
                length = float(row.pow(2).sum().sqrt())
                if length > (0 if norm == "unit" else 1):
                    row /= length
    return AdamState(param, m, v)


def _product(codes: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """codes @ W, where a code of 0 adds nothing even if its row of W is not finite."""
    if bool(W.isfinite().all()):
        return codes @ W
    return torch.where(codes[:, :, None] == 0, 0.0, codes[:, :, None] * W).sum(1)
