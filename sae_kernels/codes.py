"""SparseCodes, the package's sparse type, and LatentOrder, its entries sorted by latent."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch.utils import _pytree

from sae_kernels.primitives import checks
from sae_kernels.primitives.terms import Term
from sae_kernels.primitives.transpose_codes import transpose_codes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scipy.sparse import csr_array

_Codes = TypeVar("_Codes", bound="SparseCodes")


class LatentOrder(NamedTuple):
    """The entries of one or several sets of codes sorted by latent, as weight gradients read them.

    Attributes:
        offsets: int32 [F + 1], where each latent's entries start.
        entries: int32 [N], positions in the flattened (concatenated) codes, ascending per latent.
        rows: int32 [N], the token of each entry.
    """

    offsets: torch.Tensor
    entries: torch.Tensor
    rows: torch.Tensor

    def counts(self) -> torch.Tensor:
        """Number of entries of each latent, int32 [F]."""
        return self.offsets.diff()

    def by_group(
        self, indices: torch.Tensor, group_ends: torch.Tensor, n_tokens: int
    ) -> LatentOrder:
        """This order with rows in a source [G * n_tokens, D] that has n_tokens rows per group.

        ``indices`` are those of the codes; the latents of group g end before ``group_ends[g]``.
        """
        group = torch.bucketize(indices.flatten(), group_ends, right=True, out_int32=True)
        return self._replace(rows=group[self.entries.long()] * n_tokens + self.rows)

    def term(self, coef: torch.Tensor, source: torch.Tensor | None) -> Term:
        """The sum of ``coef * source[row]`` over each latent's entries; None stands for ones."""
        return Term(*self, coef.flatten(), source)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseCodes:
    """The kept latents of every token and their values: codes [..., F] without the zeros.

    Either K entries per token, or ragged: any number per token, concatenated token by token.
    A dropped entry (zeroed by ReLU) keeps its index and has the value +0: it adds nothing, gets no
    gradient and does not count as fired.

    Attributes:
        values: [..., K], fp32 (fp64 for fp64 input), in selection order: largest key first. Ragged:
            [N], by token, then by latent.
        indices: int32, like ``values``; distinct latents per token, dropped entries aside.
        n_latents: F.
        offsets: of ragged codes, int32 [tokens + 1], where each token's entries start.
        leading: of ragged codes, the shape of the batch of tokens; None stands for [tokens].

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 3.0, 0.0, 1.0]]), k=2)
        >>> codes.indices.tolist(), codes.values.tolist()
        ([[1, 3]], [[3.0, 1.0]])
        >>> codes.to_dense().tolist()
        [[0.0, 3.0, 0.0, 1.0]]
    """

    values: torch.Tensor
    indices: torch.Tensor
    n_latents: int
    offsets: torch.Tensor | None = None
    leading: tuple[int, ...] | None = None

    @property
    def k(self) -> int:
        """Kept entries per token."""
        if self.offsets is not None:
            raise ValueError("k: expected codes of k entries a token, got ragged ones")
        return int(self.indices.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the batch of tokens."""
        if self.offsets is None:
            return tuple(self.values.shape[:-1])
        return (self.offsets.shape[0] - 1,) if self.leading is None else self.leading

    @property
    def tokens(self) -> torch.Tensor:
        """The token of each entry, int32 and like ``values`` with the leading shape flattened."""
        device = self.indices.device
        if self.offsets is None:
            rows = torch.arange(self.indices[..., 0].numel(), dtype=torch.int32, device=device)
            return rows[:, None].expand(-1, self.k)
        rows = torch.arange(self.offsets.shape[0] - 1, dtype=torch.int32, device=device)
        size = self.indices.shape[0]
        return rows.repeat_interleave(self.offsets.diff(), output_size=size)

    def flat(self) -> SparseCodes:
        """These codes with the leading dimensions flattened: [tokens, K], or ragged."""
        if self.offsets is not None:
            return self if self.leading is None else dataclasses.replace(self, leading=None)
        if self.values.dim() == 2:
            return self
        shape = (-1, self.k) if self.k else (math.prod(self.batch_shape), 0)
        return self.with_values(self.values.reshape(shape), self.indices.reshape(shape))

    def with_values(
        self: _Codes, values: torch.Tensor, indices: torch.Tensor | None = None
    ) -> _Codes:
        """A copy with other values (and indices) of the same shape."""
        indices = self.indices if indices is None else indices
        return dataclasses.replace(self, values=values, indices=indices)

    @classmethod
    def cat(cls, parts: Sequence[SparseCodes]) -> SparseCodes:
        """The codes of several batches [tokens, K], or ragged, as those of one batch.

        Example:
            >>> one = SparseCodes.from_dense(torch.eye(2), k=1)
            >>> SparseCodes.cat([one, one]).indices.flatten().tolist()
            [0, 1, 0, 1]
        """
        values = torch.cat([part.values for part in parts])
        indices = torch.cat([part.indices for part in parts])
        lengths = [part.offsets.diff() for part in parts if part.offsets is not None]
        offsets = None
        if lengths:
            offsets = torch.nn.functional.pad(torch.cat(lengths).cumsum(0), (1, 0)).to(torch.int32)
        return cls(values, indices, parts[0].n_latents, offsets)

    def first(self, counts: torch.Tensor) -> SparseCodes:
        """The first entries of every token, of codes [B, K]: ragged ones, ``counts`` [B] each.

        Example:
            >>> codes = SparseCodes.from_dense(torch.tensor([[1.0, 3.0], [4.0, 2.0]]), k=2)
            >>> some = codes.first(torch.tensor([0, 1]))
            >>> some.values.tolist(), some.offsets.tolist()
            ([4.0], [0, 0, 1])
        """
        kept = torch.arange(self.k, device=counts.device) < counts[:, None]
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        codes = self.with_values(self.values[kept], self.indices[kept])
        return dataclasses.replace(codes, offsets=offsets)

    @classmethod
    def from_dense(cls, dense: torch.Tensor, k: int) -> SparseCodes:
        """Keeps the k largest entries of each row of [..., F], ties to the lower latent.

        The values are differentiable.

        Raises:
            ValueError: k outside [1, F].
        """
        n_latents = dense.shape[-1]
        if not 1 <= k <= n_latents:
            raise ValueError(f"k: expected 1 <= k <= n_latents = {n_latents}, got {k}")
        key = dense.to(checks.accumulator(dense.dtype)) + 0.0  # -0 becomes +0
        order = key.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return cls(key.gather(-1, order), order.to(torch.int32), n_latents)

    def to_dense(self) -> torch.Tensor:
        """The dense codes [..., F], zeros where no entry is; differentiable."""
        shape = (*self.batch_shape, self.n_latents)
        dense = self.values.new_zeros(shape)
        if self.offsets is None:
            # A dropped entry may name a latent that another entry has, so values are added.
            return dense.scatter_add(-1, self.indices.long(), self.values)
        places = self.tokens.long() * self.n_latents + self.indices.long()
        return dense.flatten().scatter_add(0, places, self.values).view(shape)

    def to_torch_sparse(self) -> torch.Tensor:
        """A torch sparse COO tensor [tokens, F], leading dimensions flattened."""
        where = torch.stack([self.tokens.flatten().long(), self.indices.long().flatten()])
        size = (math.prod(self.batch_shape), self.n_latents)
        return torch.sparse_coo_tensor(where, self.values.flatten(), size, check_invariants=True)

    def to_scipy(self) -> csr_array:
        """A SciPy ``csr_array`` [tokens, F] on the CPU, without gradient.

        Leading dimensions are flattened, entries of value 0 are left out, and each row is sorted by
        latent. Values keep their dtype, fp32 or fp64.

        Raises:
            ImportError: SciPy is not installed.

        Example:
            >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 3.0, 0.0, 1.0]]), k=3)
            >>> array = codes.to_scipy()
            >>> array.shape, array.indices.tolist(), array.data.tolist()
            ((1, 4), [1, 3], [3.0, 1.0])
        """
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ImportError(
                "to_scipy: expected SciPy, it is not installed; pip install scipy"
            ) from error
        values = self.values.detach().flatten().cpu()
        indices, tokens = self.indices.flatten().cpu(), self.tokens.flatten().cpu().long()
        kept = values != 0
        n_tokens = math.prod(self.batch_shape)
        starts = torch.zeros(n_tokens + 1, dtype=torch.int64)
        starts[1:] = torch.bincount(tokens[kept], minlength=n_tokens).cumsum(0)
        parts = (values[kept].numpy(), indices[kept].numpy(), starts.numpy())
        array = csr_array(parts, shape=(n_tokens, self.n_latents))
        array.sort_indices()
        return array

    def columns(self, latents: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The dense values of some latents: ``to_dense()[..., latents]`` without forming [..., F].

        Args:
            latents: n indices from 0 to F - 1, in any order, repeated or not. A tensor is read by
                the host.

        Returns:
            [..., n] in the dtype of ``values``, with zeros where a token does not have the latent;
            differentiable in ``values``.

        Raises:
            TypeError: not a list of integers.
            ValueError: an index outside [0, F).

        Example:
            >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 3.0, 0.0, 1.0]]), k=2)
            >>> codes.columns([3, 0]).tolist()
            [[1.0, 0.0]]
        """
        wanted = checks.latents(latents, self.n_latents).to(self.indices.device)
        n, n_tokens = wanted.shape[0], math.prod(self.batch_shape)
        distinct, places = wanted.unique(return_inverse=True)
        width = distinct.shape[0]
        column = torch.full((self.n_latents,), -1, device=wanted.device)
        column[distinct] = torch.arange(width, device=wanted.device)
        at = column[self.indices.flatten().long()]
        # Entries of other latents go to an extra last element, which is cut off.
        where = torch.where(at < 0, n_tokens * width, self.tokens.flatten().long() * width + at)
        dense = self.values.new_zeros(n_tokens * width + 1)
        dense = dense.scatter_add(0, where, self.values.flatten())
        return dense[:-1].view(n_tokens, width)[:, places].view(*self.batch_shape, n)

    def latent_order(self, *, drop_zeros: bool = True, backend: str | None = None) -> LatentOrder:
        """Sorts the entries by latent; ``drop_zeros`` leaves out entries whose value is 0."""
        flat = self.flat()
        values = flat.values.detach() if drop_zeros else None
        rows = None if self.offsets is None else self.tokens
        order = transpose_codes(flat.indices, values, rows, self.n_latents, backend=backend)
        return LatentOrder(*order)


def joint_latent_order(
    sets: Sequence[SparseCodes], *, drop_zeros: bool = True, backend: str | None = None
) -> LatentOrder:
    """One latent order for several sets of codes over the same tokens and latents.

    Positions count through the sets one after the other; rows are tokens in each.
    """
    indices = torch.cat([codes.indices.flatten() for codes in sets])
    values = torch.cat([codes.values.detach().flatten() for codes in sets]) if drop_zeros else None
    rows = torch.cat([codes.tokens.flatten() for codes in sets])
    return LatentOrder(*transpose_codes(indices, values, rows, sets[0].n_latents, backend=backend))


def _leaves(codes: SparseCodes) -> dict[str, torch.Tensor]:
    names = ("values", "indices") if codes.offsets is None else ("values", "indices", "offsets")
    return {name: getattr(codes, name) for name in names}


def _structure(codes: SparseCodes) -> list[Any]:
    return [codes.n_latents, None if codes.leading is None else list(codes.leading)]


def flatten_codes(codes: SparseCodes) -> tuple[list[Any], list[Any]]:
    """Splits codes into their tensors and their sizes, for torch's pytrees."""
    return list(_leaves(codes).values()), _structure(codes)


def unflatten_codes(leaves: Iterable[torch.Tensor], structure: list[Any]) -> SparseCodes:
    """Rebuilds codes from the tensors and sizes of :func:`flatten_codes`."""
    values, indices, *offsets = leaves
    n_latents, leading = structure
    leading = None if leading is None else tuple(leading)
    return SparseCodes(values, indices, n_latents, offsets[0] if offsets else None, leading)


# Sizes are part of the structure, not leaves: tree_map sees tensors only.
_pytree.register_pytree_node(
    SparseCodes,
    flatten_codes,
    unflatten_codes,
    serialized_type_name="sae_kernels.SparseCodes",
    flatten_with_keys_fn=lambda codes: (
        [(_pytree.GetAttrKey(name), leaf) for name, leaf in _leaves(codes).items()],
        _structure(codes),
    ),
)
