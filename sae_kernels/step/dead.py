"""Which latents are dead: counters on the device, read without waiting for the host."""

from __future__ import annotations

import torch

from sae_kernels.primitives.pick_dead import pick_dead


class DeadLatents:
    """Tokens since each latent last fired.

    A latent fires when an entry of it is kept with a value that ReLU did not zero.

    Attributes:
        since_fired: int64 [F].
        after: tokens without firing that make a latent dead.
        padded: whether :meth:`pick` leaves the padding in: on a GPU the host must not ask how many
            latents are dead.

    Example:
        >>> dead = DeadLatents(3, after=2)
        >>> dead.update(torch.tensor([1, 0, 0]), n_tokens=2, skip=torch.tensor(False))
        >>> dead.mask().tolist()
        [False, True, True]
    """

    def __init__(self, n_latents: int, after: int, device: torch.device | None = None) -> None:
        self.after = after
        self.since_fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.padded = self.since_fired.device.type != "cpu"

    def update(self, counts: torch.Tensor, n_tokens: int, skip: torch.Tensor) -> None:
        """Takes in how often each latent fired in a batch, unless the step was skipped."""
        aged = torch.where(counts > 0, 0, self.since_fired + n_tokens)
        self.since_fired.copy_(torch.where(skip, self.since_fired, aged))  # a graph keeps the place

    def mask(self) -> torch.Tensor:
        """Which latents are dead, bool [F]."""
        return self.since_fired >= self.after

    def pick(self, at_most: int, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The longest dead latents, at most so many, int32 in ascending order, and their number."""
        latents, count = pick_dead(self.since_fired, self.after, at_most, backend=backend)
        return latents if self.padded else latents[: int(count)], count

    def longest(self, at_most: int) -> torch.Tensor:
        """The same without padding, int64; waits for the device."""
        latents, count = self.pick(at_most)
        return latents[: int(count)].long()
