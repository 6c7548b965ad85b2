"""The next step of a route as a problem for the dense oracle, in fp64."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.nn import GatedSAE
from sae_kernels.testing import DenseSpec, dense_loss
from sae_kernels.train.objective import fixed_prefixes, random_prefixes

if TYPE_CHECKING:
    from torch import Tensor

    from sae_kernels.testing import DenseResult
    from sae_kernels.train import ComposableStep, FusedStep

    Parameters = dict[str, Tensor]
    Route = FusedStep | ComposableStep


class Problem(NamedTuple):
    """A step's inputs in fp64, in the scale of training."""

    spec: DenseSpec
    p: Parameters
    x: Tensor
    y: Tensor
    dead: Tensor

    def solve(self, **changes: Any) -> DenseResult:
        """The oracle, perhaps of another specification."""
        spec = dataclasses.replace(self.spec, **changes)
        return dense_loss(spec, self.p, self.x, self.y, self.dead)

    def roundings(self) -> int:
        """On the way of a term: to h, to the residual, to the slopes, over the tokens (where it
        passes b_dec also over the latents), in the batch's variance and in the decoder's norms;
        and those of the scales, coefficients and entry-wise functions."""
        B, d_in, d_out, F = len(self.x), self.x.shape[1], self.y.shape[1], len(self.p["W_enc"])
        return d_in + 2 * F + 3 * d_out + 4 * B + 64

    def tokens(self, kept: Tensor) -> Problem:
        """The same for some of the tokens."""
        return self._replace(x=self.x[kept], y=self.y[kept])


def spec_of(route: Route) -> DenseSpec:
    """The specification of the route's next step."""
    sae, train, schedule = route.sae, route.config, route.schedule
    config, name = sae.config, sae.config.architecture
    ends = fixed_prefixes(sae, train) or random_prefixes(sae, train, schedule.step)
    return DenseSpec(
        name,  # type: ignore[arg-type]
        k=getattr(config, "k", 0),
        relu=getattr(config, "relu", "after") != "none",
        subtract_b_dec=config.subtract_b_dec,
        rank_by_decoder_norm=getattr(config, "rank_by_decoder_norm", False),
        bandwidth=getattr(config, "bandwidth", 0.0),
        loss=train.loss,
        multi_topk=train.multi_topk,
        group_ends=None if ends is None else tuple(ends.ends.tolist()),
        group_weights=_weights(train.matryoshka, ends),
        penalty=train.sparsity,
        coefficient=float(schedule.coefficient()),
        norm_weighted=train.sparsity_norm_weighted,
        norm=config.decoder_norm,
        n_layers=config.n_layers,
        p=schedule.p,
        tanh_scale=train.tanh_scale,
        target_l0=train.target_l0 or 0.0,
        preact=train.preact_coefficient,
        aux_stops_decoder=not isinstance(sae, GatedSAE) or sae.config.frozen_decoder,
    )


def _weights(matryoshka: str, ends: Any) -> tuple[float, ...] | None:
    n = 0 if ends is None else len(ends.ends)
    return (1.0,) * n if n and matryoshka == "sum" else None


def problem(route: Route, x: Tensor, target: Tensor | None) -> Problem:
    """The next step's; the scaled activations carry one rounding, the same everywhere."""
    sae = route.sae
    p = {n: t.detach().double().requires_grad_() for n, t in sae.named_parameters()}
    x = x * sae.config.activation_scale
    y = x if target is None else target * sae.config.target_scale
    return Problem(spec_of(route), p, x.double(), y.double(), route.dead.mask())


def theta(p: Parameters) -> Tensor:
    """JumpReLU's thresholds."""
    return p["log_threshold"].exp() if "log_threshold" in p else p["threshold"]


def variance(y: Tensor) -> Tensor:
    """What FVU divides by."""
    return (y - y.mean(0)).square().sum()
