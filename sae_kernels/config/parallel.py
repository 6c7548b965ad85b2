"""Settings of a run on several processes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sae_kernels.config.base import NATURAL, SCALE, Settings, setting


@dataclasses.dataclass(frozen=True)
class ParallelConfig(Settings):
    """Settings of training on several processes, started by torchrun (docs/distributed.md).

    Example:
        >>> some = ParallelConfig(tokens_over=2).fitted(4, 2048, 24576, element_bytes=4)
        >>> some.latents_over, some.tokens_over
        (2, 2)
    """

    table = "parallel"

    latents_over: int = setting(
        0,
        "parts of the latents whose sums of a reconstruction are added up; times tokens_over it is "
        "the number of processes that train; 0: what sends the fewest bytes (docs/distributed.md)",
        NATURAL,
    )
    tokens_over: int = setting(
        0,
        "processes that decode with the same rows of W_dec, each a part of the tokens; 0: what "
        "sends the fewest bytes",
        NATURAL,
    )
    blocks: int = setting(
        0,
        "blocks of latents whose sums are added in one order, a divisor of n_latents: runs on as "
        "many processes as leave each a power of two of them have the same bits; 0 is the fastest",
        NATURAL,
    )
    timeout: float = setting(
        600.0,
        "seconds to wait for a process that does not answer; all others stop then",
        SCALE,
    )
    partial_sums: Literal["float32", "bfloat16"] = setting(
        "float32",
        "how processes send each other their parts of reconstructions; bfloat16 is half the bytes "
        "and an error of 2^-9 of each part (docs/distributed.md)",
    )

    harvest_ranks: int = setting(
        0,
        "processes, the last ones, that run the language model for the others, which train; 0: all "
        "do both",
        NATURAL,
    )

    def training_ranks(self, processes: int) -> range:
        """The ranks that train, of so many processes.

        Raises:
            ValueError: none.
        """
        if self.harvest_ranks >= processes:
            raise ValueError(
                f"harvest_ranks: expected fewer than the {processes} processes, as others train, "
                f"got {self.harvest_ranks}; start with torchrun --nproc-per-node "
                f"{self.harvest_ranks + 1} or more -m sae_kernels ..."
            )
        return range(processes - self.harvest_ranks)

    def model_ranks(self, processes: int) -> range:
        """The ranks that run the model, of so many processes: those that do not train, or all."""
        return range(processes - self.harvest_ranks if self.harvest_ranks else 0, processes)

    def layouts(self, processes: int) -> list[tuple[int, int]]:
        """The numbers (latents_over, tokens_over) for so many that train, most latents first.

        Raises:
            ValueError: none that these settings allow.
        """
        every = [(s, processes // s) for s in range(processes, 0, -1) if processes % s == 0]
        S, R = self.latents_over, self.tokens_over
        found = [(s, r) for s, r in every if S in (0, s) and R in (0, r)]
        if not found:
            wanted = max(S, 1) * max(R, 1) + self.harvest_ranks
            raise ValueError(
                f"latents_over, tokens_over: expected numbers whose product is that of the "
                f"processes, {processes}, got {S} and {R}; start with torchrun --nproc-per-node "
                f"{wanted} -m sae_kernels ..."
            )
        return found

    def fitted(
        self, processes: int, batch_size: int, n_latents: int, element_bytes: int
    ) -> ParallelConfig:
        """These settings with both numbers: what is 0 so that a process sends the fewest bytes.

        Args:
            processes: how many train.
            batch_size, n_latents: of the run; with prefixes, a token counts once for each.
            element_bytes: of a number in the rows of W_dec that kernels read.

        Raises:
            ValueError: none that these settings allow.
        """

        def sent(layout: tuple[int, int]) -> float:
            return self.traffic(*layout, batch_size, n_latents, element_bytes)

        latents, tokens = min(self.layouts(processes), key=sent)
        return dataclasses.replace(self, latents_over=latents, tokens_over=tokens)

    def traffic(
        self,
        latents_over: int,
        tokens_over: int,
        batch_size: int,
        n_latents: int,
        element_bytes: int,
    ) -> float:
        """Bytes that a process sends in a step for each column of W_dec, where layouts differ.

        Partial sums of the tokens' reconstructions, and rows of W_dec.
        """
        part = 4 if self.partial_sums == "float32" else 2
        sums = part * batch_size * (latents_over - 1)
        rows = element_bytes * n_latents * (tokens_over - 1)
        return (sums + rows) / (latents_over * tokens_over)
