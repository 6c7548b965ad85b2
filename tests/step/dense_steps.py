"""What a training step of any architecture should compute: the dense oracle in fp64, with bounds.

The values are :func:`~sae_kernels.testing.dense_loss` under autograd, AuxK, projection and clipping
those of `bounded`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from sae_kernels.nn import CrossLayer
from sae_kernels.testing import assert_within
from tests.step.architectures import B
from tests.step.bounded import Bounded, Kept, add_rows, auxk_step, clipped, projected
from tests.step.cross_layer import rows_of
from tests.step.dense_problem import problem, variance
from tests.step.dense_twin import bounds

if TYPE_CHECKING:
    from torch import Tensor

    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step import StepResult
    from tests.step.dense_problem import Problem, Route


class Expected(NamedTuple):
    """What a step should compute."""

    loss: Bounded
    fvu: Bounded
    aux_loss: Bounded
    gradients: dict[str, Bounded]  # projected and clipped
    fired: Tensor  # [F], how often each latent fired


def expected(route: Route, x: Tensor, target: Tensor | None) -> Expected:
    """What the route's next step should compute on a batch whose decisions are clear."""
    given = problem(route, x, target)
    result = given.solve()
    errors = bounds(given, result)
    grads = torch.autograd.grad(result.loss, list(given.p.values()))
    gradients = {n: Bounded(g, errors[n]) for n, g in zip(given.p, grads, strict=True)}
    residual = Bounded((result.y_hat - given.y).detach(), errors["residual"])
    loss, aux_loss = Bounded(result.loss.detach(), errors["loss"]), Bounded.exact(torch.zeros(()))
    if route.objective.auxk_alpha and given.dead.any():
        aux_loss, blocks = _auxk(route, x * route.sae.config.activation_scale, given, residual)
        loss = loss + aux_loss
        for name, block in blocks.items():
            gradients[name] = add_rows(gradients[name], given.dead, block)
    config = route.sae.config
    if isinstance(route.sae, CrossLayer):
        for name in ("W_enc", "W_dec"):
            parts = (gradients[name].value, gradients[name].error)
            gradients[name] = Bounded(*(rows_of(config, name, part) for part in parts))
    if config.unit_norm_decoder:
        rows = Bounded.exact(route.sae.W_dec.detach().double())
        gradients["W_dec"] = projected(gradients["W_dec"], rows, config.row_parts)
    if route.optimizer.clip_norm is not None:
        gradients = clipped(gradients, route.optimizer.clip_norm)
    fvu = residual.value.square().sum() / variance(given.y)
    fired = (result.codes != 0).sum(0)
    return Expected(loss, Bounded(fvu, errors["fvu"]), aux_loss, gradients, fired)


def assert_result(result: StepResult, want: Expected) -> None:
    """The losses within their bounds, the counts exactly."""
    for field in ("loss", "fvu", "aux_loss"):
        bound = getattr(want, field)
        assert_within(field, getattr(result, field), bound.value, bound.error)
    assert not result.skipped
    assert float(result.l0) == pytest.approx(int(want.fired.sum()) / B, rel=2**-23)


def _auxk(
    route: Route, x: Tensor, given: Problem, residual: Bounded
) -> tuple[Bounded, dict[str, Bounded]]:
    """AuxK of so few dead latents that all of them take part."""
    sae: SparseAutoencoder = route.sae
    centred = x - sae.b_dec.detach() if sae.config.subtract_b_dec else x
    dead = given.dead.nonzero().flatten()
    assert len(dead) <= route.k_aux
    rows = tuple(
        Bounded.exact(given.p[name].detach()[dead]) for name in ("W_enc", "b_enc", "W_dec")
    )
    h = centred.double() @ rows[0].value.T + rows[1].value
    kept = Kept(torch.arange(len(dead)).expand(len(x), -1), h > 0)
    train = dataclasses.replace(route.objective, k_aux=route.k_aux)
    out = auxk_step(Bounded.exact(centred), residual.times(-1), rows, kept, train, torch.float32)
    return out.loss, out.gradients
