"""Batches of which nobody can doubt which entries are kept, rounding being what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.testing import rounding
from sae_kernels.testing.dense import decoder_norm
from sae_kernels.testing.dense_selection import rank_order
from tests.step.dense_problem import problem, theta

if TYPE_CHECKING:
    from torch import Tensor

    from tests.step.dense_problem import Problem, Route


def clear_batch(
    route: Route, x: Tensor, target: Tensor | None, n: int
) -> tuple[Tensor, Tensor | None]:
    """The first n tokens that are clear, and clear together."""
    given = problem(route, x, target)
    kept = (~_doubtful(given)).nonzero().flatten()
    while given.spec.selection == "batchtopk" and len(kept) >= n:
        at = _doubtful_cut(given.tokens(kept[:n]))
        if at is None:
            break
        kept = torch.cat([kept[:at], kept[at + 1 :]])
    assert len(kept) >= n, "expected more tokens that are clear"
    return x[kept[:n]], None if target is None else target[kept[:n]]


def _band(given: Problem) -> tuple[Tensor, Tensor]:
    """h [B, F] and how far a computed one may be off."""
    p = {n: t.detach() for n, t in given.p.items()}
    x = given.x.abs() + (p["b_dec"].abs() if given.spec.subtract_b_dec else 0)
    size = x @ p["W_enc"].abs().T + p["b_enc"].abs()
    return given.solve().h.detach(), rounding(given.x.shape[1] + 4, size, torch.float32)


def _keys(given: Problem) -> tuple[Tensor, Tensor]:
    """What ranks the entries, and how far that may be off."""
    spec, (h, band) = given.spec, _band(given)
    if spec.selection == "switch":
        routes, n = given.routes(), given.router_roundings()
        key = torch.where(routes.allowed, routes.gates * h, -torch.inf)
        off = band * routes.gates + rounding(n, (routes.gates * h).abs(), torch.float32)
        return key, off
    if spec.by_magnitude:
        h = h.abs()
    if not spec.rank_by_decoder_norm:
        return h, band
    W_dec = given.p["W_dec"].detach()
    norms = decoder_norm(W_dec, spec.norm, spec.n_layers)
    return h * norms, band * norms + rounding(W_dec.shape[1] + 6, (h * norms).abs(), torch.float32)


def _doubtful(given: Problem) -> Tensor:
    """bool [B]: tokens of which an entry lies within rounding of where it is decided on."""
    spec, (h, band) = given.spec, _band(given)
    doubt = h.abs() <= band
    if spec.selection == "jumprelu":
        thresholds, half = theta(given.p).detach(), spec.bandwidth / 2
        band = band + rounding(4, thresholds.abs() + half, torch.float32)
        for edge in (thresholds - half, thresholds, thresholds + half):
            doubt |= (h - edge).abs() <= band
    if spec.selection == "gated":
        scale = given.p["r_mag"].detach().exp()
        b_enc, b_mag = (given.p[n].detach() for n in ("b_enc", "b_mag"))
        size = scale * (h - b_enc) + b_mag
        terms = scale * (h.abs() + b_enc.abs()) + b_mag.abs()
        doubt |= size.abs() <= scale * band + rounding(8, terms, torch.float32)
    found = doubt.any(1)
    if spec.selection == "switch":
        logits = given.routes().probabilities.log()  # up to one number for all of a token's
        found |= _close_cut(logits, given.logit_band(), 1)
    if spec.selection in ("topk", "switch"):
        key, off = _keys(given)
        for k in (spec.k, 4 * spec.k) if spec.multi_topk else (spec.k,):
            groups = (t.unflatten(1, (spec.n_sources, -1)).flatten(0, 1) for t in (key, off))
            found |= _close_cut(*groups, int(k)).view(len(key), -1).any(1)
    return found


def _close_cut(key: Tensor, off: Tensor, k: int) -> Tensor:
    """bool [rows]: whether the last kept key and the next are within rounding."""
    if k >= key.shape[1]:
        return torch.zeros(len(key), dtype=torch.bool)
    order = rank_order(key)[:, k - 1 : k + 1]
    pair, bands = key.gather(1, order), off.gather(1, order)
    return pair[:, 0] - pair[:, 1] <= bands.sum(1)


def _doubtful_cut(given: Problem) -> int | None:
    """The token that holds the batch's last kept entry, if the next could have been it."""
    h, _ = _band(given)
    key, off = (t.masked_fill(h <= 0, 0).reshape(1, -1) for t in _keys(given))
    n = int(given.spec.k * len(h))
    if n >= int((h > 0).sum()) or not _close_cut(key, off, n):
        return None
    return int(rank_order(key)[0, n - 1]) // h.shape[1]
