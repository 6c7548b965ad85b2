"""Ranks that train one SAE: each has the rows of some latents, and encodes all tokens on them.

Each token has an owner among the ranks. Its winners are found exactly, by counts: every rank sends
the owner the keys of its k best entries, and gets back how many of them are among the k best of
all. These are the first of its sorted list, and rank order is latent order, so that ties go to the
lower latent as on one device. The owner selects first, and says from which key on others need look.
The owners add up partial reconstructions, or get the codes and decode them
(:mod:`sae_kernels.distributed.grid`), and the residuals are gathered; all else is local. With
gathered activations of s bytes a number and sums of parts a rank sends
``(G - 1) / G B (D (s + 8) + 4 K + 8)`` bytes a step, whatever F is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import pad

from sae_kernels.codes import SparseCodes
from sae_kernels.distributed.batch_topk import largest
from sae_kernels.distributed.batches import GatheredBatches
from sae_kernels.distributed.collectives import Collectives, share
from sae_kernels.distributed.grid import Grid
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.decode_residual.reference import summed_up
from sae_kernels.primitives.terms import tree_sum
from sae_kernels.step import FusedStep
from sae_kernels.step.state import DeadRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

    from sae_kernels.data.batches import Batches
    from sae_kernels.nn.objective import Prefixes
    from sae_kernels.step.base import StepBase


class LatentRanks:
    """:class:`~sae_kernels.step.ranks.Ranks` over a process group.

    Args:
        group: the processes; None: this one alone.
        n_latents: of the whole SAE.
        tokens_over: how many ranks decode with the same rows, each some tokens.
        blocks: every sum over latents is made of this many blocks' sums, added up in the order of a
            binary tree: runs on all numbers of ranks agree bit for bit for which each has a power
            of two of them. 0: as it is fastest.
        partial_sums: dtype in which parts of reconstructions are sent.
        timeout: seconds to wait for a rank that does not answer.

    Attributes:
        rank, size: of the group.
        n_latents, blocks, partial_sums: as given.
        latents: those of this rank.
        collectives: the exchanges, which count the bytes they send.
        grid: who decodes which tokens.

    Raises:
        ValueError: fewer latents than ranks, or blocks that do not divide the latents.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        n_latents: int,
        *,
        tokens_over: int = 1,
        blocks: int = 0,
        partial_sums: Literal["float32", "bfloat16"] = "float32",
        timeout: float = 600.0,
    ) -> None:
        self.collectives = Collectives(group)
        self.rank, self.size = self.collectives.rank, self.collectives.size
        shares = [share(n_latents, rank, self.size) for rank in range(self.size)]
        if not shares[-1]:
            raise ValueError(
                f"n_latents: expected latents for each of {self.size} ranks, got {n_latents}, of "
                f"which the first ranks take {len(shares[0])} each; use fewer ranks"
            )
        if blocks and n_latents % blocks:
            raise ValueError(f"blocks: expected a divisor of n_latents = {n_latents}, got {blocks}")
        self.n_latents, self.blocks, self.partial_sums = n_latents, blocks, partial_sums
        self.latents = shares[self.rank]
        self._largest_share = len(shares[0])
        self.grid = Grid(self.collectives, shares, tokens_over, timeout)
        f = len(self.latents)
        blocks = blocks if blocks % self.size == 0 else 0
        n_blocks = max(1, blocks // self.size)
        self._blocks = [slice(i * f // n_blocks, (i + 1) * f // n_blocks) for i in range(n_blocks)]
        self._decoded_blocks = max(1, blocks // self.grid.shards.size)

    def gathered(self, batches: Batches, batch_size: int) -> GatheredBatches:
        """Whole batches of ``batch_size`` rows, given this rank's shares of them."""
        return GatheredBatches(batches, batch_size, self.collectives)

    def check(self, step: StepBase) -> None:
        """Raises ValueError for what cannot be trained with latents spread over ranks."""
        sae = step.sae
        if sae.latents != self.latents:
            raise ValueError(
                f"latents: expected those of rank {self.rank}, {self.latents}, got {sae.latents}"
            )
        if not isinstance(step, FusedStep):
            raise ValueError("route: expected 'fused' with latents over ranks, got another step")
        if not sae.spreads:
            raise ValueError(
                "latents over ranks: expected an architecture whose selection goes over them, got "
                f"{type(sae).__name__}; train it in one process"
            )
        if step.objective.sparsity == "lp":
            raise ValueError("sparsity: expected another than 'lp' with latents over ranks")
        if sae.rows_to_finish(step.objective):
            raise ValueError("fix_shrinkage: expected false with latents over ranks, got true")

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over ranks; its gradient reaches this rank's own part."""
        own = x.detach()
        return self.collectives.total(own) + (x - own)

    def over_latents(self, part: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        """The sum over all latents, given the one over some of this rank's."""
        return self.collectives.total(tree_sum([part(block) for block in self._blocks]))

    def over_tokens(
        self, part: Callable[..., tuple[torch.Tensor, ...]], *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The sums over all tokens of what ``part`` gives of the rows of some.

        Each rank computes a share. With ``blocks`` there are as many of tokens as of latents, added
        up in the same order.
        """
        n_blocks, n_tokens = len(self._blocks) * self.size, len(rows[0])
        mine = range(self.rank * len(self._blocks), (self.rank + 1) * len(self._blocks))
        cuts = [slice(n_tokens * i // n_blocks, n_tokens * (i + 1) // n_blocks) for i in mine]
        parts = [part(*(x[cut] for x in rows)) for cut in cuts]
        return tuple(self._summed(tree_sum(each)) for each in zip(*parts, strict=True))

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over ranks; of a large one's rows each sums some for all."""
        if x.dim() < 2:
            return self.collectives.total(x)
        rows = self.collectives.sum_to_owners(x, "sums over tokens")
        return self.collectives.gather_rows(rows, len(x), "sums over tokens")

    def top(
        self,
        select: Callable[..., tuple[SparseCodes, torch.Tensor]],
        x: torch.Tensor,
        k: int,
    ) -> SparseCodes:
        """This rank's entries among each token's k largest of all ranks.

        Of a share of the tokens each rank selects first. What is below its k-th entry of a token
        has lost on all ranks, which therefore look at fewer entries of the other tokens.
        """
        if self.size == 1:
            return select(x, k)[0]
        f, most = len(self.latents), min(k, self._largest_share)
        own, n = self.collectives.share(len(x)), min(k, f)
        first = select(x[own], n)
        floor = first[1][:, -1] if n == k else torch.full_like(first[1][:, -1], -torch.inf)
        floor = self.collectives.gather_rows(floor.contiguous(), len(x), "floors")
        before, after = slice(0, own.start), slice(own.stop, len(x))
        found = [
            first if some is own else select(x[some], n, floor[some])
            for some in (before, own, after)
            if len(x[some])
        ]
        parts = [(codes.values, codes.indices, keys) for codes, keys in found]
        values, indices, keys = (torch.cat(each) for each in zip(*parts, strict=True))
        counts = self._counts(_wide(keys, most, -torch.inf), k)
        return first[0].with_values(values, indices).first(counts)

    def winners(self, codes: SparseCodes, keys: torch.Tensor, k: int) -> torch.Tensor:
        """How many of each token's entries are among its k largest of all ranks, [B]."""
        assert codes.offsets is not None
        tokens, width = codes.tokens.long(), min(k, self._largest_share)
        place = torch.arange(len(tokens), device=tokens.device) - codes.offsets[tokens]
        listed = keys.new_full((len(codes.offsets) - 1, width), -torch.inf)
        first = place < width
        listed[tokens[first], place[first]] = keys[first]
        return self._counts(listed, k)

    def _counts(self, keys: torch.Tensor, k: int) -> torch.Tensor:
        """How many of the keys [B, n] are among each token's k largest of all ranks, [B].

        What is listed less on the last rank, -inf, comes after its equals.
        """
        n_tokens, n = keys.shape
        every = torch.cat(self.collectives.to_owners(keys, "candidates"), dim=1)
        best = (every + 0.0).sort(dim=1, descending=True, stable=True).indices[:, :k] // n
        counts = best.new_zeros((self.size, len(best)), dtype=torch.int32)
        counts.T.scatter_add_(1, best, torch.ones_like(best, dtype=torch.int32))
        return torch.cat(self.collectives.exchange(counts, "counts"))[:n_tokens]

    def largest_of_batch(
        self, codes: SparseCodes, keys: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which entries are among the ``count`` largest of all ranks, and how many all have."""
        places = codes.tokens.long() * self.n_latents + codes.indices + self.latents.start
        return largest(keys, places, count, self.collectives)

    def least(self, x: torch.Tensor) -> torch.Tensor:
        """The smallest of a scalar over ranks."""
        return self.collectives.gather(x, "sums").amin(0)

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
        """The primitive of this name, with x_hat the sum of the rows of all ranks' entries."""
        n, n_blocks = len(target), len(self._blocks)
        if self.size == 1 and (n_blocks == 1 or group_ends is None):
            rest = (b_dec, target, drop_zeros, group_ends, group_weights, offsets, n_blocks)
            e, squares, grad = decode_residual(values, indices, W, *rest, backend=backend)
            # By blocks with the bits that several ranks have.
            return e, squares if n_blocks == 1 else _squares(e, backend), grad
        grid = self.grid
        own = grid.owned(n)
        codes = grid.to_decoders(SparseCodes(values, indices, len(self.latents), offsets), n)
        where = W, None, grid.ends(group_ends), codes.offsets, self._decoded_blocks
        partial = decode(codes.values, codes.indices, *where, backend=backend)
        # Prefixes [G, B, D] are exchanged as [B, G, D].
        mine = partial if group_ends is None else partial.transpose(0, 1)
        if grid.shards.size > 1:
            sent_as = getattr(torch, self.partial_sums)
            mine = grid.shards.sum_to_owners(mine, "partial sums", sent_as)
        mine = mine[: own.stop - own.start]  # in place: fresh memory would cost more than sums
        if b_dec is not None:
            mine.add_(b_dec)
        mine.sub_(target[own] if group_ends is None else target[own, None])
        e = grid.gather(mine, n, out=partial if group_ends is None else None)
        if group_ends is not None:
            e = e.transpose(0, 1).contiguous()
        squares, e = _squares(e, backend), summed_up(e, group_ends, group_weights)
        grad = code_grad(e, indices, grid.mine(W), group_ends, offsets, backend=backend)
        return e, squares, torch.where(values == 0, 0, grad) if drop_zeros else grad

    def decoder(self, W_dec: torch.Tensor) -> torch.Tensor:
        """The rows of W_dec that this process decodes with, given its own."""
        return self.grid.decoder(W_dec)

    def prefixes(self, whole: Prefixes, latents: range) -> Prefixes:
        """Prefixes of all latents as prefixes of those in this process."""
        ends = (whole.ends - latents.start).clamp(0, len(latents))
        return whole._replace(ends=ends.to(torch.int32))

    def longest_dead(self, own: DeadRows, ages: torch.Tensor, at_most: int) -> DeadRows:
        """The latents of all ranks that are dead longest, given this rank's and their ages."""
        device, listed = ages.device, min(at_most, self._largest_share)
        found = pad(own.latents, (0, listed - len(own.latents)), value=-1).long()
        known = torch.where(found >= 0, ages[found.clamp(min=0)], -1)
        every = self.collectives.gather(known, "ages").flatten()
        order = every.sort(descending=True, stable=True).indices[:at_most]
        count = (every[order] >= 0).sum(dtype=torch.int32)
        chosen = torch.where(every[order] >= 0, order, every.numel()).sort().values
        if device.type == "cpu":  # here alone the host knows how many there are
            chosen = chosen[: int(count)]
        place = chosen - self.rank * listed
        mine = (place >= 0) & (place < listed)
        local = torch.where(mine, found[place.clamp(0, listed - 1)], -1)

        def rows(of: torch.Tensor) -> torch.Tensor:
            picked = of.detach()[local.clamp(min=0)]
            picked[~mine] = 0
            # Each row is one rank's, and zeros elsewhere: sums of its bytes are its bytes.
            return self.collectives.counted(picked.view(torch.uint8), "dead rows").view(of.dtype)

        W_enc, W_dec, b_enc = rows(own.W_enc), rows(own.W_dec), rows(own.b_enc[:, None])
        every_row = torch.arange(len(chosen), dtype=torch.int32, device=device)
        return DeadRows(W_enc, b_enc[:, 0], W_dec, every_row, count, local.to(torch.int32))


def _squares(e: torch.Tensor, backend: str | None) -> torch.Tensor:
    """The sum of the squares of each row [..., D], without a tensor of squares."""
    rows = e.flatten(0, -2)
    each = torch.arange(len(rows), dtype=torch.int32, device=e.device)[:, None]
    return code_grad(rows, each, rows, backend=backend).view(e.shape[:-1])


def _wide(x: torch.Tensor, width: int, value: float) -> torch.Tensor:
    """Rows [B, n] of another width, padded at the end."""
    return pad(x, (0, width - x.shape[1]), value=value)
