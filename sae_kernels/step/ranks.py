"""What a step asks of the other processes where the latents of an SAE are spread over several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Prefixes
    from sae_kernels.step.base import StepBase
    from sae_kernels.step.state import DeadRows


class Ranks(Protocol):
    """Processes ("ranks") that train one SAE together, each with the rows of its own latents.

    All make the same steps on the same tokens. Rank order is latent order, and whatever is the same
    on every rank (b_dec, the loss, the schedules) has the same bits there. A step whose ``ranks``
    is None is one process with all latents, and asks nobody.

    Attributes:
        rank, size: the number of this process, and how many there are.
    """

    rank: int
    size: int

    def check(self, step: StepBase) -> None:
        """Raises ValueError for what cannot be trained with latents spread over ranks."""

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over ranks; its gradient reaches this rank's own part."""

    def over_latents(self, part: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """The sum over all latents, given the one over some of this rank's."""

    def top(
        self,
        select: Callable[..., tuple[SparseCodes, torch.Tensor]],
        x: torch.Tensor,
        k: int,
    ) -> SparseCodes:
        """This rank's entries among each token's k largest of all ranks, largest first.

        Args:
            select: given some tokens and n, their n largest entries here, largest first, and keys
                that rank them; of those tokens whose keys are below a third argument any others.
            x: all tokens.
            k: entries that a token keeps.
        """

    def winners(self, codes: SparseCodes, keys: torch.Tensor, k: int) -> torch.Tensor:
        """How many of each token's entries from :meth:`top` are among its k largest, [B].

        Args:
            codes: ragged entries of this rank.
            keys: what ranks them, like their values.
            k: fewer than were kept.
        """

    def largest_of_batch(
        self, codes: SparseCodes, keys: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which entries are among the ``count`` largest of all ranks, and how many all have.

        Args:
            codes: ragged entries of this rank.
            keys: what ranks them, positive or NaN, which comes first; [N].
            count: entries that all ranks keep together; equal ones by token, then by latent.

        Returns:
            bool [N], and the number of entries of all ranks.
        """

    def least(self, x: torch.Tensor) -> torch.Tensor:
        """The smallest of a scalar over ranks."""

    def decoder(self, W_dec: torch.Tensor) -> torch.Tensor:
        """The rows of W_dec that this process decodes with at this step, given its own."""

    def decode_residual(
        self,
        values: torch.Tensor,
        indices: torch.Tensor,
        W: torch.Tensor,
        b_dec: torch.Tensor | None,
        target: torch.Tensor,
        drop_zeros: bool,
        group_ends: torch.Tensor | None = None,
        group_weights: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The primitive of this name, with x_hat the sum of the rows of all ranks' entries.

        ``W`` is what :meth:`decoder` gave.
        """

    def prefixes(self, whole: Prefixes, latents: range) -> Prefixes:
        """Prefixes of all latents as prefixes of those in this process."""

    def longest_dead(self, own: DeadRows, ages: torch.Tensor, at_most: int) -> DeadRows:
        """The latents of all ranks that are dead longest, given this rank's and their ages."""

    def over_tokens(
        self, part: Callable[..., tuple[torch.Tensor, ...]], *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The sums over all tokens of what ``part`` gives of the rows of some.

        Each process computes a share of them. ``rows`` are [B, ...] each, its arguments.
        """
