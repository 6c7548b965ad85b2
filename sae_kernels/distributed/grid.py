"""Tokens over ranks: who decodes which tokens, with the decoder rows of whom.

G = S R ranks are, in order, S shards of R. Each has the rows of F/G latents, and reads those of
W_dec of its whole shard: F/S. Each decodes the tokens of one of R parts of a batch, whose entries
the ranks of its shard send it. With S = 1 (tokens over ranks) a reconstruction is whole there; with
R = 1 (latents over ranks) every rank decodes its own entries of all tokens, and sends no codes; in
between S partial sums are added up. A rank sends ``(R - 1) / R F / S D s`` bytes of rows of s bytes
a number, and ``4 B D (S - 1) / (S R)`` of partial sums.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from sae_kernels.codes import SparseCodes
from sae_kernels.distributed.collectives import Collectives

if TYPE_CHECKING:
    from collections.abc import Sequence


class Grid:
    """Ranks as S shards of R. Made by all of them at once, as it makes process groups.

    Args:
        everybody: all ranks.
        latents: of each of them, in order.
        replicas: R, a divisor of their number.
        timeout: seconds to wait for a rank that does not answer.

    Attributes:
        everybody: as given.
        shards: the S ranks that decode the same tokens.
        replicas: the R ranks of this one's shard, which decode with the same rows.
    """

    def __init__(
        self, everybody: Collectives, latents: Sequence[range], replicas: int, timeout: float
    ) -> None:
        if everybody.size % replicas:
            raise ValueError(
                f"tokens_over: expected a divisor of the number of processes, {everybody.size}, "
                f"got {replicas}"
            )
        self.everybody = self.shards = self.replicas = everybody
        if replicas == 1:
            self.replicas = Collectives(None)
        elif replicas == everybody.size:
            self.shards = Collectives(None)
        else:
            ranks = torch.tensor(dist.get_process_group_ranks(everybody.group)).view(-1, replicas)
            self.replicas = _own(ranks.tolist(), everybody, timeout)
            self.shards = _own(ranks.T.tolist(), everybody, timeout)
        start = everybody.rank // replicas * replicas
        shard = range(latents[start].start, latents[start + replicas - 1].stop)
        mine = latents[everybody.rank]
        self._n_rows, self._most = len(shard), len(latents[0]) * replicas
        self._mine = slice(mine.start - shard.start, mine.stop - shard.start)
        self._rows: torch.Tensor | None = None

    def decoder(self, W: torch.Tensor) -> torch.Tensor:
        """The shard's rows of W_dec, given this rank's; overwritten by the next call."""
        if self.replicas.size == 1:
            return W
        if self._rows is None:  # kept, as fresh pages are slow
            self._rows = W.new_empty((self._most, W.shape[1]))
        rows = self.replicas.gather_rows(W, self._most, "decoder rows", out=self._rows)
        return rows[: self._n_rows]

    def mine(self, decoder: torch.Tensor) -> torch.Tensor:
        """This rank's of the shard's rows of W_dec."""
        return decoder[self._mine]

    def ends(self, own: torch.Tensor | None) -> torch.Tensor | None:
        """Prefixes of the shard's latents, given those of this rank's; None: there are none."""
        return own if own is None else self.replicas.counted(own.clone())

    def width(self, n_tokens: int) -> int:
        """Tokens whose residuals a rank computes; the last ranks have fewer."""
        return -(-n_tokens // self.everybody.size)

    def owned(self, n_tokens: int) -> slice:
        """The tokens of a batch whose residuals this rank computes: of its part its share."""
        place = self.replicas.rank * self.shards.size + self.shards.rank
        return self.everybody.share(n_tokens, place)

    def to_decoders(self, codes: SparseCodes, n_tokens: int) -> SparseCodes:
        """The shard's entries of this rank's part of the tokens, given its entries of all.

        The part has :meth:`width` tokens for each shard, the last of them without entries where a
        batch ends. Entries of a token come in the order of the ranks. The host waits for numbers.
        """
        R = self.replicas.size
        if R == 1:
            return codes
        assert codes.offsets is not None
        part = self.width(n_tokens) * self.shards.size
        counts = pad(codes.offsets.diff(), (0, R * part - n_tokens)).view(R, part)
        came = torch.stack(self.replicas.exchange(counts, "counts")).long()
        latents = codes.indices + self._mine.start
        entries = torch.stack([codes.values.view(torch.int32), latents], dim=1)
        entries = self.replicas.exchange_rows(entries, counts.sum(1), came.sum(1), "codes")
        # They come rank by rank and are wanted token by token.
        offsets = pad(came.sum(0).cumsum(0), (1, 0))
        first = offsets[:-1] + came.cumsum(0) - came
        moved = first.flatten() - (came.flatten().cumsum(0) - came.flatten())
        place = torch.arange(len(entries), device=came.device)
        place += moved.repeat_interleave(came.flatten(), output_size=len(entries))
        sorted_ = torch.empty_like(entries)
        sorted_[place] = entries
        values, indices = sorted_.T.contiguous().unbind()
        whole = offsets.to(torch.int32)
        return SparseCodes(values.view(torch.float32), indices, self._n_rows, whole)

    def gather(
        self, rows: torch.Tensor, n_tokens: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Everybody's residuals [n_tokens, ...], given those of :meth:`owned`."""
        S, R, width = self.shards.size, self.replicas.size, self.width(n_tokens)
        found = self.everybody.gather_rows(rows, width * S * R, "residuals", out=out)
        # Ranks are in the order of shards, tokens in that of parts.
        by_part = found.view(S, R, width, *rows.shape[1:]).transpose(0, 1)
        return by_part.reshape(found.shape)[:n_tokens]


def _own(groups: list[list[int]], like: Collectives, timeout: float) -> Collectives:
    """The exchanges of the one of these groups of ranks that has this one."""
    (ranks,) = [ranks for ranks in groups if dist.get_rank() in ranks]
    wait = timedelta(seconds=timeout)
    made = dist.new_group(ranks, timeout=wait, use_local_synchronization=True)
    return Collectives(made, like.sent)
