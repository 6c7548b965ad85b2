"""How far a step in fp32 may be from the dense oracle.

Given which entries are kept, every loss and gradient is a sum of products of the inputs, so it is
computed to within ``gamma_n sum |terms|``, n being the roundings on the way of any term (see
`sae_kernels.testing.budgets`). The sums of absolute terms are the losses and gradients of a twin:
the same network with every number made positive and every minus a plus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.testing import rounding
from sae_kernels.testing.dense import decoder_norm
from tests.step.dense_problem import theta, variance

if TYPE_CHECKING:
    from torch import Tensor

    from sae_kernels.testing import DenseResult
    from tests.step.dense_problem import Parameters, Problem


class _Decided(NamedTuple):
    """Which entries are kept, [B, F] each, as numbers."""

    main: Tensor
    more: Tensor  # with 4k in the place of k
    gate: Tensor  # h > 0
    window: Tensor  # of JumpReLU's estimator


def bounds(given: Problem, result: DenseResult) -> dict[str, Tensor]:
    """How far each gradient may be off, the loss, the FVU and the residual."""
    spec, y = given.spec, given.y
    p = {
        n: (t if n in ("r_mag", "log_threshold") else t.abs()).detach().requires_grad_()
        for n, t in given.p.items()
    }
    twin = _Twin(given, p, _decided(given, result))
    # The variance's own error: it is a sum of squares of differences.
    spread = (y.abs() + y.abs().mean(0)).square().sum() / variance(y)
    scale = spread / variance(y) if spec.loss == "fvu" else 1 / len(y)
    penalty = twin.penalty(result)
    loss = scale * twin.error + penalty
    grads = torch.autograd.grad(loss, list(p.values()))
    sums = dict(zip(p, grads, strict=True))
    sums |= {"loss": loss, "residual": twin.residual}
    sums["fvu"] = spread / variance(y) * twin.residual.square().sum()
    n = given.roundings()
    return {name: rounding(n, t.detach(), torch.float32) for name, t in sums.items()}


def _decided(given: Problem, result: DenseResult) -> _Decided:
    spec, h = given.spec, result.h.detach()
    main = (result.codes != 0).double()
    more = main
    if spec.multi_topk:
        more = (given.solve(k=4 * spec.k, multi_topk=False).codes != 0).double()
    window = torch.zeros_like(main)
    if spec.selection == "jumprelu":
        window = ((h - theta(given.p)).abs() < spec.bandwidth / 2).double()
    return _Decided(main, more, (h > 0).double(), window)


class _Twin:
    """The network of absolute values; an exp is positive as it is."""

    def __init__(self, given: Problem, p: Parameters, decided: _Decided) -> None:
        self.given, self.p, self.decided = given, p, decided
        spec, self.x, self.y = given.spec, given.x.abs(), given.y.abs()
        x = self.x + p["b_dec"] if spec.subtract_b_dec else self.x
        self.h = x @ p["W_enc"].T + p["b_enc"]
        if spec.selection == "switch":
            self.routes = given.routes()
            self.probabilities = self._probabilities()
        self.codes = self._codes()
        residuals, self.error = self._prefixes()
        self.residual = residuals.detach()
        if spec.multi_topk:
            self.error = self.error + self._residual(decided.more * self.h).square().sum() / 8
        if spec.selection == "gated":
            self.error = self.error + self._gated_auxiliary()

    def _probabilities(self) -> Tensor:
        """The exact ones, with slopes ``p_i (1[i = j] + p_j)`` in the place of softmax's."""
        spec, p, P = self.given.spec, self.p, self.routes.probabilities
        x = self.x + p["b_router"] + (2 * p["b_dec"] if spec.subtract_b_dec else 0)
        logits = x @ p["W_router"].T
        moved = logits - logits.detach()
        return P * (1 + moved + (P * moved).sum(1, keepdim=True))

    def _codes(self) -> Tensor:
        spec, p, decided = self.given.spec, self.p, self.decided
        if spec.selection == "gated":  # a is computed as h - b_enc
            return decided.main * (p["r_mag"].exp() * (self.h + p["b_enc"]) + p["b_mag"])
        codes = decided.main * self.h
        if spec.selection == "switch" and spec.gated:
            gates = self.probabilities.gather(1, self.routes.chosen[:, None])
            owner = torch.arange(codes.shape[1]) // (codes.shape[1] // spec.n_experts)
            codes = codes * torch.where((owner == 0) & spec.shared_expert, 1.0, gates)
        if spec.selection != "jumprelu":
            return codes
        through = decided.window * theta(p).square() / (2 * spec.bandwidth)
        return codes + through - through.detach()

    def _residual(self, codes: Tensor, end: int | None = None, p: Any = None) -> Tensor:
        p = self.p if p is None else p
        total = codes[:, :end] @ p["W_dec"][:end] + p["b_dec"] + self.y
        return total + self.x @ p["W_skip"].T if "W_skip" in p else total

    def _prefixes(self) -> tuple[Tensor, Tensor]:
        spec = self.given.spec
        ends = spec.group_ends or (self.codes.shape[1],)
        weights = spec.group_weights or (1 / len(ends),) * len(ends)
        parts = [self._residual(self.codes, end) for end in ends]
        squares = [w * part.square().sum() for w, part in zip(weights, parts, strict=True)]
        return parts[-1], torch.stack(squares).sum()

    def _gated_auxiliary(self) -> Tensor:
        stops = self.given.spec.aux_stops_decoder
        p = {n: t.detach() for n, t in self.p.items()} if stops else self.p
        return self._residual(self.decided.gate * self.h, p=p).square().sum()

    def penalty(self, result: DenseResult) -> Tensor:
        """The penalties; where a slope depends on a code, what that adds to its error too."""
        spec = self.given.spec
        total = self.h.new_zeros(())
        if spec.penalty in ("l0", "target_l0"):
            through = self.decided.window * theta(self.p) / spec.bandwidth
            l0 = (self.decided.main + through - through.detach()).sum(1).mean()
            total = l0 if spec.penalty == "l0" else (l0 / spec.target_l0 + 1).square()
        elif spec.penalty != "none":
            total = self._of_codes(result).sum(1).mean()
        total = spec.coefficient * total + spec.preact * self._preact()
        if not spec.balance:
            return total
        routes = self.routes._replace(probabilities=self.probabilities)
        return total + spec.balance * routes.balance()

    def _of_codes(self, result: DenseResult) -> Tensor:
        spec = self.given.spec
        gated = spec.selection == "gated"
        f = self.decided.gate * self.h if gated else self.codes
        exact = (result.h.relu() if gated else result.codes).detach()
        if spec.norm_weighted:
            f = f * decoder_norm(self.p["W_dec"], spec.norm, spec.n_layers)
            norms = decoder_norm(self.given.p["W_dec"].detach(), spec.norm, spec.n_layers)
            exact = exact * norms
        if spec.penalty == "l1":
            return f
        if spec.penalty == "tanh":  # |d^2 tanh| < 1
            return spec.tanh_scale * f + (spec.tanh_scale * f).square() / 2
        live = torch.where(exact == 0, 1.0, exact)
        slope = spec.p * live ** (spec.p - 1) * (1 + f.detach() / live)
        return torch.where(exact == 0, 0.0, slope * f + live**spec.p)

    def _preact(self) -> Tensor:
        """In closed form: ``B theta - sum h + sum relu(h - theta)``."""
        if not self.given.spec.preact:
            return self.h.new_zeros(())
        thresholds, over = theta(self.p), (self.given_h() > theta(self.given.p)).double()
        weight = self.given.dead * decoder_norm(self.p["W_dec"].detach(), "joint", 1)
        return ((1 + over) * (thresholds + self.h) * weight).sum(1).mean()

    def given_h(self) -> Tensor:
        """The exact pre-activations."""
        return self.given.solve().h.detach()
