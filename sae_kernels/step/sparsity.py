"""The penalties that make codes sparse, and how strong they are at a step.

Every penalty is a mean over the tokens of the batch, written over the kept entries alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels import functional
from sae_kernels.nn import JumpReLUSAE
from sae_kernels.step.state import State

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder

_WATCHED = 10  # steps before a change of p over which the penalty is averaged


class Penalised(NamedTuple):
    """What the penalties look at.

    Attributes:
        pre: the kept pre-activations.
        codes: what a code is for the penalty (a Gated SAE's gate, else the codes).
        n_tokens: of the whole batch.
        norms: [F, n_layers], the decoder's norms, where they weigh.
        sums: [F], sums of all pre-activations over the batch, for ``preact_coefficient``.
        dead: bool [F], for the same; else None.
    """

    pre: SparseCodes
    codes: SparseCodes
    n_tokens: int
    norms: torch.Tensor | None
    sums: torch.Tensor | None
    dead: torch.Tensor | None


class SparsitySchedule:
    """The coefficient and p of a training run, step by step.

    The coefficient rises linearly. With "lp" p falls from 1 to ``p_end``; each time the coefficient
    is multiplied by what keeps the penalty at its mean over the last ten steps, for else a smaller
    p would be a much larger penalty (p-annealing of dictionary_learning; arXiv 2408.00113). With a
    ``target_l0`` (and a penalty that is not its own aim) the coefficient follows it once it has
    risen: each step it grows or shrinks by a factor of ``1 + 10 / steps`` (noanabeshima's 3e-4 in a
    run of 33 000 steps).

    Attributes:
        step: steps made.
        p: the exponent now.
        factor: of the coefficient, from the changes of p so far.
        control: scalar on the device, the same from following ``target_l0``.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        n = config.p_steps
        start = config.p_start * config.steps
        fractions = [i / (n - 1) if n > 1 else 1.0 for i in range(n)]
        times = [round(start + f * (config.steps - start)) for f in fractions]
        powers = [1 + (config.p_end - 1) * f for f in fractions]
        changes = dict(zip(times, powers, strict=True))  # of several at once the last
        if config.sparsity != "lp":
            changes.clear()
        self.step, self.p, self.factor = 0, changes.pop(0, 1.0), 1.0
        self._changes = list(changes.items())
        self._seen: list[torch.Tensor] = []
        self.control: torch.Tensor | None = None

    def state(self) -> State:
        """What :meth:`load_state` goes on from."""
        tensors = {} if self.control is None else {"schedule.control": self.control}
        if self._seen:
            tensors["schedule.seen"] = torch.stack(self._seen)
        values = {"step": self.step, "p": self.p, "factor": self.factor}
        return State(tensors, {"schedule": values})

    def load_state(self, state: State) -> None:
        """Takes up what :meth:`state` gave."""
        values = state.values["schedule"]
        self.step, self.p, self.factor = int(values["step"]), values["p"], values["factor"]
        self._changes = [change for change in self._changes if change[0] > self.step]
        self.control = state.tensors.get("schedule.control")
        self._seen = list(state.tensors.get("schedule.seen", ()))

    def coefficient(self) -> float | torch.Tensor:
        """What multiplies the penalty now."""
        value = self.config.sparsity_coefficient * self._risen() * self.factor
        return value if self.control is None else value * self.control

    def _risen(self) -> float:
        warmup = self.config.sparsity_warmup_steps
        warmup = min(2000, self.config.steps // 5) if warmup is None else warmup
        return min(1.0, (self.step + 1) / warmup) if warmup else 1.0

    def observe(self, codes: torch.Tensor) -> None:
        """Takes in what this step's penalty sums the powers of, in one or several calls."""
        if not self._changes:
            return
        time, power = self._changes[0]
        if time - _WATCHED <= self.step < time:
            codes = codes.detach()
            self._seen.append(
                torch.stack([_powers(codes, p).float().sum() for p in (self.p, power)])
            )

    def advance(self, l0: torch.Tensor) -> None:
        """Goes on to the next step; ``l0`` is this one's."""
        target = self.config.target_l0
        if target is not None and self.config.sparsity != "target_l0" and self._risen() == 1:
            self.control = torch.ones_like(l0) if self.control is None else self.control
            step = 1 + 10 / self.config.steps
            self.control = self.control * torch.where(l0 > target, step, 1 / step)
        self.step += 1
        if not self._changes or self.step < self._changes[0][0]:
            return
        if self._seen:
            seen = torch.stack(self._seen)
            now, then = seen[seen.isfinite().all(1)].sum(0).tolist()  # not of a skipped step
            ratio = now / then if then else 1.0
            self.factor *= ratio if 0 < ratio < math.inf else 1.0
        self.p = self._changes.pop(0)[1]
        self._seen.clear()


def penalty(
    sae: SparseAutoencoder, parts: Penalised, schedule: SparsitySchedule
) -> torch.Tensor | None:
    """What is added to the loss, differentiable; None where there is nothing."""
    config = schedule.config
    terms = []
    if config.sparsity != "none" and config.sparsity_coefficient:
        terms.append(schedule.coefficient() * _sparsity(sae, parts, schedule))
    if config.preact_coefficient:
        terms.append(config.preact_coefficient * _preact(sae, parts))
    return torch.stack(terms).sum() if terms else None


def _sparsity(sae: SparseAutoencoder, parts: Penalised, schedule: SparsitySchedule) -> torch.Tensor:
    config = schedule.config
    if config.sparsity in ("l0", "target_l0"):
        assert isinstance(sae, JumpReLUSAE)
        fires = functional.step(
            parts.pre, sae.thresholds(), sae.config.bandwidth, backend=sae.backend
        )
        l0 = fires.sum(dtype=torch.promote_types(fires.dtype, torch.float32)) / parts.n_tokens
        if config.sparsity == "l0":
            return l0
        assert config.target_l0 is not None
        return (l0 / config.target_l0 - 1).square()
    codes = parts.codes.values
    if config.sparsity_norm_weighted:
        assert parts.norms is not None
        weights = sae.latent_norms(parts.norms)
        codes = codes * functional.of_latents(weights, parts.codes, backend=sae.backend)
    if config.sparsity == "tanh":
        codes = torch.tanh(config.tanh_scale * codes)
    elif config.sparsity == "lp":
        schedule.observe(codes)
        codes = _powers(codes, schedule.p)
    # A dense tile's codes may be bf16; their sum is not.
    total = codes.sum(dtype=torch.promote_types(codes.dtype, torch.float32))
    return total / parts.n_tokens


def _powers(codes: torch.Tensor, p: float) -> torch.Tensor:
    """``codes^p``; at 0 the derivative is 0, where that of a power below 1 is infinite."""
    live = codes != 0
    return torch.where(live, torch.where(live, codes, 1) ** p, 0)


def _preact(sae: SparseAutoencoder, parts: Penalised) -> torch.Tensor:
    """``sum_f n_f mean_b relu(threshold_f - h_bf)`` over dead latents, in closed form.

    ``sum_b relu(t - h) = B t - sum_b h + sum_b relu(h - t)``; the last sum is over kept entries.
    """
    assert isinstance(sae, JumpReLUSAE)
    assert parts.sums is not None
    assert parts.norms is not None
    assert parts.dead is not None
    thresholds = sae.thresholds()
    weights = torch.where(parts.dead, parts.norms.detach().norm(dim=1), 0)
    below = (weights * (parts.n_tokens * thresholds - parts.sums)).sum()
    entry = functional.of_latents(thresholds, parts.pre, backend=sae.backend)
    over = (parts.pre.values - entry).relu()
    above = (over * functional.of_latents(weights, parts.pre, backend=sae.backend)).sum()
    return (below + above) / parts.n_tokens
