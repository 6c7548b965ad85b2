"""How a run is laid out over GPUs: what each holds and what it sends.

G = S R GPUs: the latents are cut into S shards, and R replicas of all shards take different
tokens. S = 1 is data-parallel, R = 1 latent-sharded. A GPU holds f = F / S latents and sees
b = B / R tokens.

A ring sends 2 (n - 1) / n of its bytes from each of n GPUs to add them up, (n - 1) / n to collect
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .problem import Problem

_RESIDUAL = 4  # fp32: x_hat, residual, and gradients that are exchanged
_ENTRY = 8  # a candidate: fp32 value, int32 latent


class Message(NamedTuple):
    """What every GPU sends at one point of a step.

    Attributes:
        what: tokens, candidates, partial sums or gradients.
        bytes: sent by one GPU.
        span: how many neighbouring GPUs its group is spread over.
    """

    what: str
    bytes: float
    span: int


@dataclass(frozen=True)
class Layout:
    """S shards of the latents times R replicas."""

    shards: int
    replicas: int

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.shards * self.replicas

    @property
    def name(self) -> str:
        """In words."""
        if self.gpus == 1:
            return "one device"
        if self.shards == 1:
            return "data-parallel"
        return "latent-sharded" if self.replicas == 1 else f"{self.shards} x {self.replicas}"

    def tokens(self, problem: Problem) -> int:
        """That a GPU sees, b."""
        return -(-problem.batch // self.replicas)

    def latents(self, problem: Problem) -> int:
        """That a GPU holds, f."""
        return -(-problem.n_latents // self.shards)

    def kept(self, problem: Problem) -> float:
        """Entries that a GPU's latents have in a step: of its tokens, those that won there."""
        return self.tokens(problem) * problem.k / self.shards

    def touched(self, problem: Problem) -> float:
        """The most latents of a GPU that fire in a step of its replica."""
        return min(self.latents(problem), self.kept(problem))

    def gradient_rows(self, problem: Problem) -> tuple[str, float]:
        """Which rows of gradients replicas exchange, and how many a GPU sends of each matrix.

        Dense: all f rows are added up in a ring. Touched: everybody collects everybody's rows that
        are not zero; it is taken where it sends less. Without replicas there is no exchange.
        """
        R = self.replicas
        dense = 2 * (R - 1) / R * self.latents(problem)
        touched = (R - 1) * self.touched(problem)
        if R == 1:
            return "none", 0.0
        return ("dense", dense) if dense <= touched else ("touched", touched)

    def messages(self, problem: Problem) -> list[Message]:
        """What a step sends; vectors of F and D are left out."""
        D, S, b = problem.d_in, self.shards, self.tokens(problem)
        rest = (S - 1) / S
        rows = self.gradient_rows(problem)[1]
        candidates = 2 * b * min(problem.k, self.latents(problem)) * _ENTRY * rest
        found = [
            Message("tokens", b * D * problem.element_bytes * rest, S),
            Message("candidates", candidates, S),
            Message("partial sums", 2 * b * D * _RESIDUAL * rest, S),
            Message("gradients", 2 * rows * D * _RESIDUAL, self.gpus),
        ]
        return [message for message in found if message.bytes]

    def memory(self, problem: Problem) -> dict[str, float]:
        """Bytes that a GPU needs, by what they hold; the kernels' scratch is left out."""
        D, b, f = problem.d_in, self.tokens(problem), self.latents(problem)
        kept = min(problem.k, f)
        entry = 20 + (2 * _ENTRY if self.shards > 1 else 0)
        return {
            # And b_enc with its moments, dead-latent counters, offsets, counts, dx_sum.
            "weights and states": f * (D * problem.state_bytes + 32),
            "gradients": 2 * D * _RESIDUAL * self.gradient_rows_held(problem),
            # x and the residual in fp32, the centred x as the product reads it.
            "tokens": b * D * (2 * _RESIDUAL + problem.element_bytes),
            # Value, latent, gradient and two places in latent order; candidates sent and received.
            "codes": b * kept * entry,
        }

    def gradient_rows_held(self, problem: Problem) -> float:
        """How many rows of gradients of each matrix a GPU writes to memory and reads again."""
        how, _ = self.gradient_rows(problem)
        if how == "touched":
            return self.replicas * self.touched(problem)
        return self.latents(problem) if how == "dense" else 0.0


def layouts(gpus: int) -> list[Layout]:
    """Every split of the GPUs into shards and replicas, data-parallel first.

    Example:
        >>> [layout.name for layout in layouts(4)]
        ['data-parallel', '2 x 2', 'latent-sharded']
    """
    small = [s for s in range(1, math.isqrt(gpus) + 1) if gpus % s == 0]
    shards = sorted({*small, *(gpus // s for s in small)})
    return [Layout(s, gpus // s) for s in shards]
