"""Runs of one trainer as shipped, in another order of its sums, and accelerated, side by side.

Two runs that are the same in exact arithmetic drift apart by rounding. How far a library's own run
drifts when only the order of its sums changes (tokens in a batch, latents and dimensions permuted)
is the scale of what an accelerated run may differ by.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

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


def batches(steps: int, n_tokens: int, d_in: int) -> list[Tensor]:
    """Activations: a few of 64 directions with noise."""
    g = torch.Generator().manual_seed(1)
    directions = torch.randn(64, d_in, generator=g)
    return [
        (torch.rand(n_tokens, 64, generator=g) < 0.1).float() @ directions
        + 0.1 * torch.randn(n_tokens, d_in, generator=g)
        for _ in range(steps)
    ]


def assert_same_run(ours: Run, shipped: Run, reordered: Sequence[Run]) -> None:
    """Raises AssertionError where a run is further from the shipped one than rounding explains.

    Tensors are compared by the norm of the difference, losses by the largest one.
    """
    for name, exact in shipped.tensors.items():
        scale = max(float((run.tensors[name] - exact).norm()) for run in reordered)
        off = float((ours.tensors[name] - exact).norm())
        assert off <= MARGIN * scale, f"{name}: off by {off:.2e}, by its own rounding {scale:.2e}"
    scale = max(float((run.losses - shipped.losses).abs().max()) for run in reordered)
    off = float((ours.losses - shipped.losses).abs().max())
    assert off <= MARGIN * scale, f"losses: off by {off:.2e}, by their own rounding {scale:.2e}"
    for name, exact in shipped.counts.items():
        if all(torch.equal(run.counts[name], exact) for run in reordered):
            assert torch.equal(ours.counts[name], exact), name
