"""A step of TopK training in fp64, dense and from the formulas, that carries its rounding bound.

Every quantity is a :class:`Bounded`: its exact value given the step's inputs, and how far the
same quantity computed in fp32 (with operands rounded to the compute dtype where the contract says
so) may be from it. A sum of n products is off by ``gamma_n * sum |terms|`` in any order, with or
without FMA (Higham, 3.1); every other operation adds one rounding. So neither route's order of
work matters here, and no tolerance has to be chosen.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.testing import gamma

if TYPE_CHECKING:
    from sae_kernels.config import ObjectiveConfig, TrainConfig
    from sae_kernels.nn import TopKConfig

_U = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Bounded:
    """``value`` exactly, in fp64; a computed one is within ``error`` of it."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, t: Tensor) -> Bounded:
        """What every implementation holds bit for bit."""
        return cls(t.double(), torch.zeros(t.shape, dtype=torch.float64))

    def largest(self) -> Tensor:
        """The largest absolute value a computed one may have."""
        return self.value.abs() + self.error

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error).rounded(_U)

    def __sub__(self, other: Bounded) -> Bounded:
        return Bounded(self.value - other.value, self.error + other.error).rounded(_U)

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.largest() * other.largest() - self.value.abs() * other.value.abs()
        return Bounded(self.value * other.value, error).rounded(_U)

    def times(self, factor: float | Tensor) -> Bounded:
        """Times something known exactly."""
        factor = torch.as_tensor(factor, dtype=torch.float64)
        return Bounded(self.value * factor, self.error * factor.abs()).rounded(_U)

    def inverse(self) -> Bounded:
        """``1 / self`` for positive numbers."""
        value = 1 / self.value
        return Bounded(value, 1 / (self.value - self.error) - value).rounded(_U)

    def sum(self, dim: int | None, n: int | None = None) -> Bounded:
        """A sum in any order; ``n`` is the number of terms."""
        n = n or (self.value.numel() if dim is None else self.value.shape[dim])
        dims = tuple(range(self.value.dim())) if dim is None else dim
        error = self.error.sum(dims) + gamma(n, torch.float32) * self.largest().sum(dims)
        return Bounded(self.value.sum(dims), error)

    def __matmul__(self, other: Bounded) -> Bounded:
        return self.product(other, self.value.shape[-1])

    def product(self, other: Bounded, n: int) -> Bounded:
        """A matrix product whose sums have at most n terms that are not zero."""
        largest = self.largest() @ other.largest()
        error = largest - self.value.abs() @ other.value.abs()
        error = error.clamp(min=0) + gamma(n + 1, torch.float32) * largest
        return Bounded(self.value @ other.value, error)

    def rounded(self, u: float) -> Bounded:
        """After one more rounding of relative size u."""
        return Bounded(self.value, self.error + u * self.largest())

    def take(self, index: Tensor | tuple[Tensor, Tensor]) -> Bounded:
        """Indexed."""
        return Bounded(self.value[index], self.error[index])

    @property
    def T(self) -> Bounded:
        """Transposed."""
        return Bounded(self.value.T, self.error.T)


class Kept(NamedTuple):
    """What a route selected: latents [B, K] in selection order and those ReLU left alive."""

    indices: Tensor
    fired: Tensor

    def mask(self, count: int, n_latents: int) -> Tensor:
        """[B, F]: 1 where one of the first ``count`` is kept and alive."""
        rows = torch.zeros(self.indices.shape[0], n_latents, dtype=torch.float64)
        alive = self.fired[:, :count].double()
        return rows.scatter_(1, self.indices[:, :count].long(), alive)


class AuxExpected(NamedTuple):
    """What AuxK should compute."""

    loss: Bounded
    h: Bounded  # [B, A], pre-activations of the dead latents
    gradients: dict[str, Bounded]  # of the dead latents' rows


class Expected(NamedTuple):
    """What a step should compute."""

    h: Bounded  # [B, F], pre-activations
    key: Bounded  # [B, F], what ranks the latents
    aux_h: Bounded | None  # [B, A], pre-activations of the dead latents
    loss: Bounded
    fvu: Bounded
    aux_loss: Bounded
    gradients: dict[str, Bounded]  # projected and clipped
    unit_norm: bool  # whether decoder rows are renormalised


def expected_step(
    weights: dict[str, Tensor],
    x: Tensor,
    sae: TopKConfig,
    train: TrainConfig,
    k: int,
    kept: Kept,
    dead: Tensor,
    aux_kept: Kept | None,
    upstream: torch.dtype = torch.float32,
) -> Expected:
    """The step from these fp32 weights, given what the route selected (to be checked apart).

    Args:
        weights: W_enc, b_enc, W_dec, b_dec before the step.
        x: raw activations [B, D].
        sae, train, k: the settings.
        kept: the main selection, 4k wide with multi-TopK.
        dead: the latents in AuxK, possibly none.
        aux_kept: AuxK's selection, in positions of ``dead``.
        upstream: what dL/dx_hat is rounded to where it is multiplied with codes or rows.
    """
    u = torch.finfo(upstream).eps / 2 if upstream != torch.float32 else 0.0
    F, B = sae.n_latents, x.shape[0]
    dtype: torch.dtype = getattr(torch, train.optimizer.compute)
    scaled = x.float() * sae.activation_scale  # both of one rounding, the same everywhere
    centred = scaled - weights["b_dec"] if sae.subtract_b_dec else scaled
    X, x_c = Bounded.exact(scaled), Bounded.exact(centred.to(dtype))
    W_enc, W_dec = (Bounded.exact(weights[n].to(dtype)) for n in ("W_enc", "W_dec"))
    b_enc, b_dec = (Bounded.exact(weights[n]) for n in ("b_enc", "b_dec"))
    variance = _variance(X)
    scale = (
        variance.inverse() if train.objective.loss == "fvu" else Bounded.exact(torch.tensor(1 / B))
    )

    h = x_c @ W_enc.T + b_enc
    key = h
    if sae.rank_by_decoder_norm:
        squares = Bounded.exact(weights["W_dec"]) * Bounded.exact(weights["W_dec"])
        key = h * _sqrt(squares.sum(1))
    parts = [(k, 1.0)] + ([(min(4 * k, F), 1 / 8)] if train.objective.multi_topk else [])
    loss, dh, dW_dec, db_dec, first = None, None, None, None, None
    for count, weight in parts:
        mask = kept.mask(count, F)
        codes = h.times(mask)
        residual = codes.product(W_dec, count + 1) + b_dec - X
        squared = (residual * residual).sum(None)
        factor = scale.times(2 * weight)
        operand = residual.rounded(u)
        share = [
            scale.times(weight) * squared,
            factor * (operand @ W_dec.T).times(mask),
            (factor * codes).T @ operand,
            factor * residual.sum(0),
        ]
        if first is None:
            first = residual, squared * variance.inverse()
            loss, dh, dW_dec, db_dec = share
        else:
            loss, dh, dW_dec, db_dec = (
                a + b for a, b in zip((loss, dh, dW_dec, db_dec), share, strict=True)
            )
    # As W^T sum_b dh or as sum_b W^T dh: either way B + F roundings at most.
    db_enc = dh.sum(0)
    if sae.subtract_b_dec:
        db_dec = db_dec - dh.sum(0, n=B + F).product(W_enc, B + F)
    gradients = {"W_enc": dh.T @ x_c, "b_enc": db_enc, "W_dec": dW_dec, "b_dec": db_dec}
    aux_loss, aux_h = Bounded.exact(torch.zeros(())), None
    if aux_kept is not None:
        target = first[0].times(-1)
        rows = W_enc.take(dead), b_enc.take(dead), W_dec.take(dead)
        aux_loss, aux_h, blocks = auxk_step(x_c, target, rows, aux_kept, train.objective, dtype)
        for name, block in blocks.items():
            gradients[name] = add_rows(gradients[name], dead, block)
    if sae.unit_norm_decoder:
        gradients["W_dec"] = projected(gradients["W_dec"], Bounded.exact(weights["W_dec"]))
    if train.optimizer.clip_norm is not None:
        gradients = clipped(gradients, train.optimizer.clip_norm)
    total = loss + aux_loss
    return Expected(h, key, aux_h, total, first[1], aux_loss, gradients, sae.unit_norm_decoder)


def auxk_step(
    x_c: Bounded,
    target: Bounded,
    rows: tuple[Bounded, Bounded, Bounded],
    kept: Kept,
    objective: ObjectiveConfig,
    dtype: torch.dtype,
) -> AuxExpected:
    """Loss, pre-activations and gradients; products round in and out in the compute dtype."""
    W_enc, b_enc, W_dec = rows
    n_dead = b_enc.value.shape[0]
    k_aux = objective.k_aux or x_c.value.shape[1] // 2
    u = torch.finfo(dtype).eps / 2
    h = x_c @ W_enc.T + b_enc
    mask = kept.mask(kept.indices.shape[1], n_dead)
    codes = h.times(mask).rounded(u)
    error = (codes @ W_dec).rounded(u) - target
    weight = _variance(target).inverse().times(objective.auxk_alpha * min(n_dead / k_aux, 1))
    grad = (weight.times(2) * error).rounded(u)
    dh = (grad @ W_dec.T).rounded(u).times(mask)
    blocks = {
        "W_enc": (dh.T @ x_c).rounded(u),
        "b_enc": dh.sum(0).rounded(u),
        "W_dec": (codes.T @ grad).rounded(u),
    }
    return AuxExpected(weight * (error * error).sum(None), h, blocks)


def _variance(x: Bounded) -> Bounded:
    rows = x.value.shape[0]
    away = x - x.sum(0).times(1 / rows)
    return (away * away).sum(None)


def _sqrt(x: Bounded) -> Bounded:
    value = x.value.sqrt()
    return Bounded(value, value - (x.value - x.error).clamp(min=0).sqrt()).rounded(_U)


def add_rows(whole: Bounded, latents: Tensor, block: Bounded) -> Bounded:
    """The block added to the rows of these latents."""
    value, error = whole.value.clone(), whole.error.clone()
    value[latents] += block.value
    error[latents] += block.error
    return Bounded(value, error).rounded(_U)


def projected(grad: Bounded, W: Bounded, slices: int = 1) -> Bounded:
    """Without what lies along each (unit) slice of the rows."""
    g, w = (
        Bounded(*(t.unflatten(1, (slices, -1)) for t in (each.value, each.error)))
        for each in (grad, W)
    )
    along = (g * w).sum(2)
    out = g - Bounded(along.value[..., None], along.error[..., None]) * w
    return Bounded(out.value.flatten(1), out.error.flatten(1))


def clipped(gradients: dict[str, Bounded], at: float) -> dict[str, Bounded]:
    """By their norm together."""
    total = None
    for gradient in gradients.values():
        squares = (gradient * gradient).sum(None)
        total = squares if total is None else total + squares
    norm = _sqrt(total)
    value = (at / (norm.value + 1e-6)).clamp(max=1)
    high = (at / (norm.value - norm.error + 1e-6)).clamp(max=1)
    low = (at / (norm.value + norm.error + 1e-6)).clamp(max=1)
    clip = Bounded(value, torch.maximum(high - value, value - low)).rounded(4 * _U)
    return {name: gradient * clip for name, gradient in gradients.items()}
