"""Layouts of a training over several GPUs, with the memory and messages of each.

G = S R GPUs: the latents are cut into S shards, and R replicas of all shards take different
tokens. S = 1 is data-parallel, R = 1 latent-sharded. A GPU holds f = F / S latents and sees
b = B / R tokens.

A ring sends 2 (n - 1) / n of its bytes from each of n GPUs to add them up, (n - 1) / n to collect
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from sae_kernels.bench.work import Work, update_bytes
from sae_kernels.config import OptimizerConfig

_RESIDUAL = 4  # fp32: x_hat, residual, and gradients that are exchanged
_KEY, _COUNT = 4, 4  # of a candidate, fp32; of a token's winners on a shard, int32


@dataclass(frozen=True)
class Problem:
    """A TopK SAE to train, with the bytes of each weight.

    Attributes:
        d_in, n_latents, k: D, F and K of a TopK SAE.
        batch: tokens of a step on all GPUs together.
        dtype: of the products, "bfloat16", "float16" or "float32".
        config: master, states, copies and adam count here.

    Raises:
        ValueError: k > n_latents, or a split master without bf16.
    """

    d_in: int
    n_latents: int
    k: int
    batch: int
    dtype: str = "bfloat16"
    config: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n_latents:
            raise ValueError(f"k: expected 1 <= k <= n_latents = {self.n_latents}, got {self.k}")
        if self.config.master_weights == "split" and self.dtype != "bfloat16":
            raise ValueError(
                f"compute: expected 'bfloat16' with master_weights 'split', got {self.dtype!r}"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the encoder's operands."""
        return 4 if self.dtype == "float32" else 2

    @property
    def decoder_bytes(self) -> int:
        """Bytes of an element of W_dec as the kernels read it."""
        chosen = self.config.master_weights, self.config.compute_copies
        return 4 if chosen == ("float32", "encoder") else self.element_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes held for a latent's two weights: masters, moments and copies (docs/training.md)."""
        return 2 * (4 + 2 * self._moment_bytes) + self._copy_bytes

    @property
    def update_bytes(self) -> int:
        """Bytes that an update of a latent's two weights reads and writes."""
        alone = update_bytes(self.element_bytes, moment_bytes=self._moment_bytes, copied=False)
        return 2 * alone + self._copy_bytes

    @property
    def _copy_bytes(self) -> int:
        """Bytes of the compute copies of a latent's two weights; a split master is its own copy."""
        if self.dtype == "float32" or self.config.master_weights == "split":
            return 0
        return 4 if self.config.compute_copies == "both" else 2

    @property
    def _moment_bytes(self) -> int:
        return 4 if self.config.moment_dtype == "float32" else 2


class Message(NamedTuple):
    """A message of a step: the bytes that every GPU sends."""

    what: str  # tokens, candidates, partial sums or gradients
    bytes: float  # sent by one GPU
    span: int  # how many neighbouring GPUs its group is spread over


@dataclass(frozen=True)
class Layout:
    """A layout of GPUs: S shards of the latents times R replicas."""

    shards: int
    replicas: int

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.shards * self.replicas

    @property
    def name(self) -> str:
        """The name of the layout, such as "data-parallel" or "2 x 2"."""
        if self.gpus == 1:
            return "one device"
        if self.shards == 1:
            return "data-parallel"
        return "latent-sharded" if self.replicas == 1 else f"{self.shards} x {self.replicas}"

    def tokens(self, problem: Problem) -> int:
        """Tokens that a GPU sees, b."""
        return -(-problem.batch // self.replicas)

    def latents(self, problem: Problem) -> int:
        """Latents that a GPU holds, f."""
        return -(-problem.n_latents // self.shards)

    def work(self, problem: Problem) -> Work:
        """The work of one GPU in a step; its latents get a share k / S of the entries."""
        share = problem.k / self.shards
        sizes = self.tokens(problem), problem.d_in, self.latents(problem), share
        return Work(*sizes, element_bytes=problem.decoder_bytes)

    def gradient_rows(self, problem: Problem) -> tuple[str, float]:
        """The kind of gradient rows that replicas exchange, and how many a GPU sends per matrix.

        Dense: all f rows are added up in a ring. Touched: everybody collects everybody's rows that
        are not zero; it is taken where it sends less. Without replicas there is no exchange.
        """
        R = self.replicas
        dense = 2 * (R - 1) / R * self.latents(problem)
        touched = (R - 1) * self.work(problem).used_rows
        name = "none" if R == 1 else "dense" if dense <= touched else "touched"
        return name, min(dense, touched)

    def messages(self, problem: Problem) -> list[Message]:
        """The messages of a step, without vectors of F and D elements.

        Those between shards are what :mod:`sae_kernels.distributed.latents` sends.
        """
        D, S, b = problem.d_in, self.shards, self.tokens(problem)
        rest, rows = (S - 1) / S, self.gradient_rows(problem)[1]
        candidates = b * (min(problem.k, self.latents(problem)) * _KEY + _COUNT) * rest
        found = [
            Message("tokens", b * D * problem.element_bytes * rest, S),
            Message("candidates", candidates, S),
            Message("partial sums", 2 * b * D * _RESIDUAL * rest, S),
            Message("gradients", 2 * rows * D * _RESIDUAL, self.gpus),
        ]
        return [message for message in found if message.bytes]

    def memory(self, problem: Problem) -> dict[str, float]:
        """Bytes of memory of a GPU by purpose, without the kernels' workspace."""
        D, b, f = problem.d_in, self.tokens(problem), self.latents(problem)
        kept = min(problem.k, f)
        entry = 20 + (2 * _KEY if self.shards > 1 else 0)
        return {
            # And b_enc with its moments, dead-latent counters, offsets, counts, dh_sum.
            "weights and states": f * (D * problem.state_bytes + 32),
            "gradients": 2 * D * _RESIDUAL * self.gradient_rows_held(problem),
            # x and the residual in fp32, the centred x as the product reads it.
            "tokens": b * D * (2 * _RESIDUAL + problem.element_bytes),
            # Value, latent, gradient and two places in latent order; keys sent and received.
            "codes": b * kept * entry,
        }

    def gradient_rows_held(self, problem: Problem) -> float:
        """Number of gradient rows of each matrix that a GPU writes to memory and reads again."""
        how, _ = self.gradient_rows(problem)
        if how == "touched":
            return self.replicas * self.work(problem).used_rows
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
