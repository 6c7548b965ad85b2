"""Layouts of a training over several GPUs, with the memory and messages of each.

G = S R GPUs, as :mod:`sae_kernels.distributed` lays them out: each has the weights and states of
F / G latents, and encodes all tokens on them. The rows of W_dec are cut into S shards, which R GPUs
each read whole: each of these decodes the entries of b = B / R tokens. S = 1 spreads tokens alone,
R = 1 latents alone.

To collect parts a GPU sends (n - 1) / n of the whole to each of n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from sae_kernels.bench.work import Work, update_bytes
from sae_kernels.config import OptimizerConfig

_RESIDUAL = 4  # fp32: x_hat, residual, and gradients that are exchanged
_KEY, _COUNT = 4, 4  # of a candidate, fp32; of a token's entries on a GPU, int32
_ENTRY = 8  # an entry that another GPU decodes: value and latent


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

    what: str  # tokens, candidates, codes, partial sums, residuals or decoder rows
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
        """The name of the layout, such as "latent-sharded" or "2 x 2"."""
        if self.gpus == 1:
            return "one device"
        if self.shards == 1:
            return "token-sharded"
        return "latent-sharded" if self.replicas == 1 else f"{self.shards} x {self.replicas}"

    def tokens(self, problem: Problem) -> int:
        """Tokens that a GPU decodes entries of, b."""
        return -(-problem.batch // self.replicas)

    def latents(self, problem: Problem) -> int:
        """Latents whose weights and states a GPU holds, f."""
        return -(-problem.n_latents // self.gpus)

    def decoder_rows(self, problem: Problem) -> int:
        """Rows of W_dec that a GPU decodes with: those of its shard."""
        return self.latents(problem) * self.replicas

    def work(self, problem: Problem) -> Work:
        """The work of one GPU in a step; its latents get a share k / G of the entries."""
        share = problem.k / self.gpus
        sizes = problem.batch, problem.d_in, self.latents(problem), share
        return Work(*sizes, element_bytes=problem.decoder_bytes)

    def messages(self, problem: Problem) -> list[Message]:
        """The messages of a step, without sums of the size of b_dec."""
        B, D, k = problem.batch, problem.d_in, problem.k
        S, R, G = self.shards, self.replicas, self.gpus
        candidates = B * ((min(k, self.latents(problem)) + 1) * _KEY + _COUNT)
        codes = B / R * (R * _COUNT + k / S * _ENTRY)
        found = [
            Message("tokens", B * D * problem.element_bytes * (G - 1) / G, G),
            Message("candidates", candidates * (G - 1) / G, G),
            Message("codes", codes * (R - 1) / R, R),
            Message("partial sums", B / R * D * _RESIDUAL * (S - 1) / S, G),
            Message("residuals", B * D * _RESIDUAL * (G - 1) / G, G),
            Message("decoder rows", self._row_bytes(problem) * (R - 1) / R, R),
        ]
        return [message for message in found if message.bytes]

    def memory(self, problem: Problem) -> dict[str, float]:
        """Bytes of memory of a GPU by purpose, without the kernels' workspace."""
        D, B, f = problem.d_in, problem.batch, self.latents(problem)
        kept = min(problem.k, f)
        entry = 20 + (2 * _KEY if self.gpus > 1 else 0)
        return {
            # And b_enc with its moments, dead-latent counters, offsets, counts, dh_sum.
            "weights and states": f * (D * problem.state_bytes + 32),
            "decoder rows": self._row_bytes(problem) if self.replicas > 1 else 0,
            # x and the residual in fp32, the centred x as the product reads it.
            "tokens": B * D * (2 * _RESIDUAL + problem.element_bytes),
            "partial sums": self.tokens(problem) * D * _RESIDUAL if self.gpus > 1 else 0,
            # Value, latent, gradient and two places in latent order; keys sent and received.
            "codes": B * kept * entry,
        }

    def _row_bytes(self, problem: Problem) -> int:
        return self.decoder_rows(problem) * problem.d_in * problem.decoder_bytes


def layouts(gpus: int) -> list[Layout]:
    """Every split of the GPUs into shards and replicas, tokens alone first.

    Example:
        >>> [layout.name for layout in layouts(4)]
        ['token-sharded', '2 x 2', 'latent-sharded']
    """
    small = [s for s in range(1, math.isqrt(gpus) + 1) if gpus % s == 0]
    shards = sorted({*small, *(gpus // s for s in small)})
    return [Layout(s, gpus // s) for s in shards]
