"""The next step of a route as a problem for the dense oracle, in fp64."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.nn import CrossLayer, GatedSAE
from sae_kernels.testing import DenseSpec, dense_loss, rounding
from sae_kernels.testing.dense_switch import routed
from tests.step.cross_layer import whole

if TYPE_CHECKING:
    from torch import Tensor

    from sae_kernels.step import AutogradStep, FusedStep
    from sae_kernels.testing import DenseResult
    from sae_kernels.testing.dense_switch import Routed

    Parameters = dict[str, Tensor]
    Route = FusedStep | AutogradStep


# Settings that not every architecture has, where they do nothing.
ABSENT: dict[str, Any] = {
    "multi_topk": False,
    "matryoshka": "mean",
    "preact_coefficient": 0.0,
    "balance_coefficient": 0.0,
}


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
        return d_in + 2 * F + 3 * d_out + 4 * B + 64 + self.router_roundings()

    def routes(self) -> Routed:
        """A Switch SAE's decisions, exactly."""
        p = {name: t.detach() for name, t in self.p.items()}
        return routed(self.spec, p, self.x, len(p["W_enc"]))

    def logit_band(self) -> Tensor:
        """How far each logit of the router may be off, [B, E]."""
        p = {name: t.detach().abs() for name, t in self.p.items()}
        x = self.x.abs() + p["b_router"]
        if self.spec.subtract_b_dec:  # it comes centred and with a bias that takes that back
            x = x + 2 * p["b_dec"]
        return rounding(self.x.shape[1] + 6, x @ p["W_router"].T, torch.float32)

    def router_roundings(self) -> int:
        """On the way of a term that holds three probabilities.

        exp makes of the logits' error a relative one, twice, for the sum of all is divided by.
        """
        if self.spec.selection != "switch":
            return 0
        logits = float(self.logit_band().max()) / 2**-24
        return 3 * (math.ceil(2 * logits) + self.p["W_router"].shape[0] + 8)

    def tokens(self, kept: Tensor) -> Problem:
        """The same for some of the tokens."""
        return self._replace(x=self.x[kept], y=self.y[kept])


def spec_of(route: Route) -> DenseSpec:
    """The specification of the route's next step."""
    sae, schedule = route.sae, route.schedule
    train = SimpleNamespace(**{**ABSENT, **route.objective.to_dict()})
    config, name = sae.config, sae.config.architecture.removeprefix("cross_layer_")
    n_sources, together = getattr(config, "n_sources", 1), getattr(config, "layers_together", False)
    ends = sae.prefixes(route.objective, schedule.step, route.seed)
    return DenseSpec(
        name,  # type: ignore[arg-type]
        k=getattr(config, "k", 0) * (n_sources if together else 1),
        relu=getattr(config, "relu", "after") != "none",
        by_magnitude=getattr(config, "by_magnitude", False),
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
        n_sources=1 if together else n_sources,
        p=schedule.p,
        tanh_scale=train.tanh_scale,
        target_l0=train.target_l0 or 0.0,
        preact=train.preact_coefficient,
        n_experts=getattr(config, "n_experts", 1),
        gated=getattr(config, "gate", "softmax") == "softmax",
        shared_expert=getattr(config, "shared_expert", False),
        balance=train.balance_coefficient * (config.output_width if train.loss == "mse" else 1),
        aux_stops_decoder=not isinstance(sae, GatedSAE) or sae.config.frozen_decoder,
    )


def _weights(matryoshka: str, ends: Any) -> tuple[float, ...] | None:
    n = 0 if ends is None else len(ends.ends)
    return (1.0,) * n if n and matryoshka == "sum" else None


def problem(route: Route, x: Tensor, target: Tensor | None) -> Problem:
    """The next step's; the scaled activations carry one rounding, the same everywhere."""
    sae = route.sae
    p = {n: t.detach().double() for n, t in sae.named_parameters()}
    if isinstance(sae, CrossLayer):
        p |= {name: whole(sae.config, name, p[name]) for name in ("W_enc", "W_dec")}
    p = {name: t.requires_grad_() for name, t in p.items()}
    x = x * sae.config.activation_scale
    y = x if target is None else target * sae.config.target_scale
    return Problem(spec_of(route), p, x.double(), y.double(), route.dead.mask())


def theta(p: Parameters) -> Tensor:
    """JumpReLU's thresholds."""
    return p["log_threshold"].exp() if "log_threshold" in p else p["threshold"]


def variance(y: Tensor) -> Tensor:
    """What FVU divides by."""
    return (y - y.mean(0)).square().sum()
