"""The collectives that steps use, over a process group; alone here torch.distributed is called."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sae_kernels.primitives.terms import tree_sum

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

# The old name goes in torch 2.13, the new one came with it.
_all_gather: Callable[..., object] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


def share(n: int, rank: int, size: int) -> range:
    """The part of n rows that a rank has: consecutive, as torch.chunk and DTensor cut them.

    Example:
        >>> [share(10, rank, 4) for rank in range(4)]
        [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    """
    width = -(-n // size)
    return range(min(rank * width, n), min((rank + 1) * width, n))


class Collectives:
    """Exchanges of tensors between the ranks of a group.

    Args:
        group: of at least one process; None: this process alone.
        sent: where to count, of another group; None: anew.

    Attributes:
        rank, size: of the group.
        sent: bytes that this rank has handed to others, by purpose, as the algorithm counts them:
            a ring's share where all get the same.
    """

    def __init__(self, group: ProcessGroup | None, sent: Counter[str] | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.sent: Counter[str] = Counter() if sent is None else sent

    def share(self, n: int, rank: int | None = None) -> slice:
        """The rows of n that a rank has, by default this one."""
        own = share(n, self.rank if rank is None else rank, self.size)
        return slice(own.start, own.stop)

    def gather(self, x: torch.Tensor, what: str) -> torch.Tensor:
        """Everybody's tensor of one shape, [size, ...]."""
        if self.size == 1:
            return x[None]
        out = x.new_empty((self.size, *x.shape))
        self._gather(x, out, what)
        return out

    def gather_rows(
        self, x: torch.Tensor, n: int, what: str, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rows [n, ...] of which each rank has its share; ``out`` may be overwritten."""
        if self.size == 1:
            return x
        width = -(-n // self.size)
        if out is None or len(out) != width * self.size:
            out = x.new_empty((width * self.size, *x.shape[1:]))
        if len(x) < width:
            x = torch.cat([x, x.new_zeros((width - len(x), *x.shape[1:]))])
        self._gather(x, out, what)
        return out[:n]

    def _gather(self, x: torch.Tensor, out: torch.Tensor, what: str) -> None:
        # As bytes: gloo does not know every dtype.
        _all_gather(_bytes(out), _bytes(x.contiguous()), group=self.group)
        self.sent[what] += x.numel() * x.element_size() * (self.size - 1)

    def exchange(self, x: torch.Tensor, what: str) -> torch.Tensor:
        """Sends x[r] to rank r, [size, ...]; returns what came, by sender."""
        if self.size == 1:
            return x
        out = torch.empty_like(x)
        dist.all_to_all_single(_bytes(out), _bytes(x), group=self.group)
        self.sent[what] += x.numel() * x.element_size() // self.size * (self.size - 1)
        return out

    def exchange_rows(
        self, x: torch.Tensor, sent: torch.Tensor, came: torch.Tensor, what: str
    ) -> torch.Tensor:
        """Sends so many rows of x [n, ...] to each rank; returns what came, by sender.

        The host waits for the numbers, int [size] each.
        """
        to, of = sent.tolist(), came.tolist()
        out = x.new_empty((sum(of), *x.shape[1:]))
        dist.all_to_all_single(out, x, of, to, group=self.group)
        self.sent[what] += (len(x) - to[self.rank]) * x[:1].numel() * x.element_size()
        return out

    def to_owners(self, x: torch.Tensor, what: str) -> torch.Tensor:
        """Everybody's numbers on this rank's share of the rows of x [n, ...]: [size, width, ...].

        Rows past the last are zeros: ``width`` is the share of the first rank.
        """
        width = -(-len(x) // self.size)
        if missing := width * self.size - len(x):
            x = torch.cat([x, x.new_zeros((missing, *x.shape[1:]))])
        return self.exchange(x.contiguous().view(self.size, width, *x.shape[1:]), what)

    def total(self, x: torch.Tensor, what: str = "sums") -> torch.Tensor:
        """The sum of a small tensor over ranks, the same bits everywhere."""
        return tree_sum(self.gather(x, what).unbind())

    def counted(self, x: torch.Tensor, what: str = "counts") -> torch.Tensor:
        """The sum of integers over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
            self.sent[what] += 2 * x.numel() * x.element_size() * (self.size - 1) // self.size
        return x


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)
