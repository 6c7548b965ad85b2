"""Union-find over pairs that arrive in tiles, for groups of duplicates."""

from __future__ import annotations

import torch


class UnionFind:
    """Connected components of n items by the pairs seen so far (union-find).

    Attributes:
        labels: int64 [n], the lowest item of each item's group.

    Example:
        >>> groups = UnionFind(5)
        >>> groups.join(torch.tensor([0, 3]), torch.tensor([3, 4]))
        >>> groups.labels.tolist(), groups.sizes().tolist()
        ([0, 1, 2, 0, 0], [3, 1, 1, 0, 0])
    """

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        self.labels = torch.arange(n, device=device)

    def join(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Merges the group of a[i] with that of b[i], for all i."""
        while True:
            a, b = self.labels[a], self.labels[b]
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            # Several pairs may hang one group on others: the lowest wins, the next round has the
            # rest, so no pair is lost.
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            self.labels.scatter_reduce_(0, high, low, "amin")
            self._flatten()

    def sizes(self) -> torch.Tensor:
        """The size of each group at its label and 0 elsewhere, int64 [n]."""
        return self.labels.bincount(minlength=len(self.labels))

    def spanning(self, parts: torch.Tensor) -> torch.Tensor:
        """Mask of groups with items of more than one part, bool [n], set at their labels.

        >>> groups = UnionFind(4)
        >>> groups.join(torch.tensor([0, 2]), torch.tensor([1, 3]))
        >>> groups.spanning(torch.tensor([0, 0, 0, 1])).tolist()
        [False, False, True, False]
        """
        lowest = parts.clone().scatter_reduce_(0, self.labels, parts, "amin")
        highest = parts.clone().scatter_reduce_(0, self.labels, parts, "amax")
        return (lowest != highest) & (self.sizes() > 0)

    def _flatten(self) -> None:
        """Points every label at its group's root."""
        while not torch.equal(above := self.labels[self.labels], self.labels):
            self.labels = above
