"""Runs of one trainer as shipped, in another order of its sums, and accelerated, side by side.

Two runs that are the same in exact arithmetic drift apart by rounding. How far a library's own run
drifts when only the order of its arithmetic changes is the scale of what an accelerated run may
differ by: tokens in a batch, latents and dimensions are permuted, which reorders all sums.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from sae_kernels.testing import gamma, unit_roundoff

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# A distance of two runs is drawn from the same law as those that it is compared with, of which
# there are few: it may be the largest of all, but not by much.
MARGIN = 3.0


@dataclasses.dataclass
class Run:
    """What a run did, in the order of the run as shipped.

    Attributes:
        losses: [steps], fp64.
        tensors: weights and Adam moments at the end, by name.
        counts: integers and exact figures at the end, by name.
    """

    losses: Tensor
    tensors: dict[str, Tensor]
    counts: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Order:
    """An order of tokens, latents and dimensions; seed 0 is the one that is shipped."""

    seed: int
    n_tokens: int
    d_in: int
    groups: tuple[int, ...]  # latents change places within their group

    def _drawn(self, n: int, part: int) -> Tensor:
        if not self.seed:
            return torch.arange(n)
        return torch.randperm(n, generator=torch.Generator().manual_seed(100 * self.seed + part))

    @property
    def tokens(self) -> Tensor:
        """Where the tokens of a batch come from."""
        return self._drawn(self.n_tokens, 0)

    @property
    def dims(self) -> Tensor:
        """Where the dimensions come from."""
        return self._drawn(self.d_in, 1)

    @property
    def latents(self) -> Tensor:
        """Where the latents come from."""
        starts = [sum(self.groups[:i]) for i in range(len(self.groups))]
        parts = [
            start + self._drawn(n, 2 + i)
            for i, (start, n) in enumerate(zip(starts, self.groups, strict=True))
        ]
        return torch.cat(parts)

    def applied(self, tensor: Tensor) -> Tensor:
        """A weight, moment or count in this order."""
        for dim, size in enumerate(tensor.shape):
            if size in (self.d_in, sum(self.groups)):
                index = self.dims if size == self.d_in else self.latents
                tensor = tensor.index_select(dim, index)
        return tensor

    def undone(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`applied`."""
        for dim, size in enumerate(tensor.shape):
            if size in (self.d_in, sum(self.groups)):
                index = self.dims if size == self.d_in else self.latents
                tensor = tensor.index_select(dim, index.argsort())
        return tensor


def batches(steps: int, n_tokens: int, d_in: int, seed: int = 1) -> list[Tensor]:
    """Activations: a few of 64 directions with noise."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, d_in, generator=g)
    return [
        (torch.rand(n_tokens, 64, generator=g) < 0.1).float() @ directions
        + 0.1 * torch.randn(n_tokens, d_in, generator=g)
        for _ in range(steps)
    ]


def assert_same_run(ours: Run, shipped: Run, reordered: Sequence[Run], n_terms: int = 160) -> None:
    """Raises AssertionError where a run is further from the shipped one than rounding explains.

    Weights and moments are compared by the norm of the difference, with the reordered run that is
    nearest: where two latents are as good as equal, an order decides which one is kept, and such a
    run says nothing of rounding. What no order of theirs changes is added: a loss is a sum of
    squares that two kernels add up in their own ways, off by gamma_n at most; and a step rounds a
    weight once and a moment three times, errors that add up like a random walk over all steps, or
    over those that a moment remembers.

    Args:
        ours: the accelerated run.
        shipped: the library's own.
        reordered: the library's own in other orders.
        n_terms: roundings on the way of a term of the loss; B + D of these tests.
    """
    n_steps = len(shipped.losses)
    for name, exact in {**shipped.tensors, "losses": shipped.losses}.items():
        own = 0.0
        if exact.dim() == 0 or name == "losses":
            own = gamma(n_terms, torch.float32) * float(exact.abs().max())
        else:
            per_step, remembered = (3, 10) if name.startswith("exp_avg ") else (1, n_steps)
            if name.startswith("exp_avg_sq"):
                per_step, remembered = 3, 1000
            n = per_step * min(n_steps, remembered)
            own = unit_roundoff(torch.float32) * n**0.5 * float(exact.norm())
        scale = min(_distance(run, shipped, name) for run in reordered)
        off = _distance(ours, shipped, name)
        assert scale <= 1e-3 * float(exact.norm()), f"{name}: ties decide, these data tell nothing"
        assert off <= MARGIN * scale + own, (
            f"{name}: off by {off:.2e}, by the run's own rounding {scale:.2e}, besides {own:.2e}"
        )
    for name, exact in shipped.counts.items():
        if all(torch.equal(run.counts[name], exact) for run in reordered):
            assert torch.equal(ours.counts[name], exact), name


def _distance(run: Run, shipped: Run, name: str) -> float:
    if name == "losses":
        return float((run.losses - shipped.losses).abs().max())
    return float((run.tensors[name] - shipped.tensors[name]).norm())
