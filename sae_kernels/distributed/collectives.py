"""The collectives that steps use, over a process group; alone here torch.distributed is called."""

from __future__ import annotations

import operator
from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sae_kernels.primitives.terms import tree_sum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import ProcessGroup

# The old name goes in torch 2.13, the new one came with it.
_all_gather: Callable[..., object] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)

_BYTES_AT_ONCE = 1 << 19


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
        # gloo's own collectives change threads, and its gathers fill memory of their own first.
        self._sends_directly = group is not None and dist.get_backend(group) == "gloo"

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
        own = _bytes(x.contiguous())
        everybody = _bytes(out).view(self.size, len(own)).unbind()
        if self._sends_directly:
            if everybody[self.rank].data_ptr() != own.data_ptr():
                everybody[self.rank].copy_(own)
            self.swap([own] * self.size, everybody)
        else:
            _all_gather(_bytes(out), own, group=self.group)
        self.sent[what] += own.numel() * (self.size - 1)

    def exchange(self, x: torch.Tensor, what: str) -> list[torch.Tensor]:
        """Sends x[r] to rank r, [size, ...]; returns what came, by sender, x[r] of itself."""
        own = self.rank
        if self.size == 1:
            return [x[own]]
        if self._sends_directly:
            came = [part if rank == own else torch.empty_like(part) for rank, part in enumerate(x)]
            self.swap([_bytes(part) for part in x], [_bytes(part) for part in came])
        else:
            out = torch.empty_like(x)
            dist.all_to_all_single(_bytes(out), _bytes(x.contiguous()), group=self.group)
            came = list(out)
        self.sent[what] += x[own].numel() * x.element_size() * (self.size - 1)
        return came

    def swap(self, x: Sequence[torch.Tensor], came: Sequence[torch.Tensor]) -> None:
        """Sends x[r] to every other rank r and waits for what comes of each."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        messages = [
            dist.P2POp(send, tensors[rank], group=self.group, group_peer=rank)
            for send, tensors in ((dist.isend, x), (dist.irecv, came))
            for rank in others
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()

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

    def to_owners(self, x: torch.Tensor, what: str) -> list[torch.Tensor]:
        """Everybody's numbers on this rank's share of the rows of x [n, ...]: [width, ...] each.

        Rows past the last are zeros: ``width`` is the share of the first rank.
        """
        return self.exchange(self._by_owner(x), what)

    def sum_to_owners(
        self, x: torch.Tensor, what: str, sent_as: torch.dtype | None = None
    ) -> torch.Tensor:
        """The sum over ranks of this rank's share of the rows of x, like :meth:`to_owners`.

        It is in the memory of x, which is overwritten. ``sent_as`` is the dtype of what is sent, by
        default that of x.
        """
        by_owner = self._by_owner(x)
        mine = by_owner[self.rank]
        row_bytes = max(1, mine[:1].numel() * mine.element_size())
        # What comes is added while it is in cache, and takes little room.
        rows = max(1, _BYTES_AT_ONCE // row_bytes) if self._sends_directly else len(mine)
        for start in range(0, len(mine), rows):
            some = slice(start, start + rows)
            parts = self.exchange(by_owner[:, some].to(sent_as or x.dtype), what)
            mine[some] = tree_sum([part.to(x.dtype) for part in parts], operator.iadd)
        return mine

    def _by_owner(self, x: torch.Tensor) -> torch.Tensor:
        width = -(-len(x) // self.size)
        if missing := width * self.size - len(x):
            x = torch.cat([x, x.new_zeros((missing, *x.shape[1:]))])
        return x.contiguous().view(self.size, width, *x.shape[1:])

    def total(self, x: torch.Tensor, what: str = "sums") -> torch.Tensor:
        """The sum of a small tensor over ranks, the same bits everywhere."""
        return tree_sum(self.gather(x, what).unbind())

    def counted(self, x: torch.Tensor, what: str = "counts") -> torch.Tensor:
        """The sum of integers over ranks, in place."""
        if self.size > 1 and x.numel():
            dist.all_reduce(x, group=self.group)
            self.sent[what] += 2 * x.numel() * x.element_size() * (self.size - 1) // self.size
        return x


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)
