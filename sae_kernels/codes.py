"""SparseCodes, the one sparse type of the package, and its latent-ordered transpose."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils import _pytree

from sae_kernels.primitives import checks
from sae_kernels.primitives.terms import Term
from sae_kernels.primitives.transpose_codes import transpose_codes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class LatentOrder(NamedTuple):
    """The entries of one or several sets of codes, by latent: what weight gradients read.

    Attributes:
        offsets: int32 [F + 1], where each latent's entries start.
        entries: int32 [N], positions in the flattened (concatenated) codes, ascending per latent.
        rows: int32 [N], the token of each entry.
    """

    offsets: torch.Tensor
    entries: torch.Tensor
    rows: torch.Tensor

    def counts(self) -> torch.Tensor:
        """How often each latent fired, int32 [F]."""
        return self.offsets.diff()

    def term(self, coef: torch.Tensor, source: torch.Tensor | None) -> Term:
        """``sum coef * source[row]`` per latent; a None source stands for ones."""
        return Term(*self, coef.flatten(), source)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseCodes:
    """The K kept latents of every token.

    A dropped entry (zeroed by ReLU) keeps its index and has the value +0: it adds nothing, gets no
    gradient and does not count as fired.

    Attributes:
        values: [..., K], fp32 (fp64 for fp64 input), in selection order: largest key first.
        indices: int32 [..., K], distinct latents per token.
        n_latents: F.

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

    @property
    def k(self) -> int:
        """Kept entries per token."""
        return int(self.indices.shape[-1])

    @classmethod
    def from_dense(cls, dense: torch.Tensor, k: int) -> SparseCodes:
        """The k largest entries of each row of [..., F], ties to the lower latent.

        The values are differentiable.
        """
        n_latents = dense.shape[-1]
        if not 1 <= k <= n_latents:
            raise ValueError(f"k: expected 1 <= k <= n_latents = {n_latents}, got {k}")
        key = dense.to(checks.accumulator(dense.dtype)) + 0.0  # -0 becomes +0
        order = key.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return cls(key.gather(-1, order), order.to(torch.int32), n_latents)

    def to_dense(self) -> torch.Tensor:
        """[..., F] with the values in place and zeros elsewhere; differentiable."""
        shape = (*self.values.shape[:-1], self.n_latents)
        return self.values.new_zeros(shape).scatter(-1, self.indices.long(), self.values)

    def to_torch_sparse(self) -> torch.Tensor:
        """The same as a torch sparse COO tensor [tokens, F] (leading dimensions flattened)."""
        values, indices = self.values.flatten(), self.indices.long().flatten()
        tokens = torch.arange(values.numel() // max(self.k, 1), device=values.device)
        where = torch.stack([tokens.repeat_interleave(self.k), indices])
        size = (tokens.numel(), self.n_latents)
        return torch.sparse_coo_tensor(where, values, size, check_invariants=True)

    def latent_order(self, *, drop_zeros: bool = True, backend: str | None = None) -> LatentOrder:
        """The entries by latent; ``drop_zeros`` leaves out dropped entries (codes after ReLU)."""
        values = self.values.detach().reshape(-1, self.k) if drop_zeros else None
        indices = self.indices.reshape(-1, self.k)
        return LatentOrder(*transpose_codes(indices, values, None, self.n_latents, backend=backend))


def joint_latent_order(
    sets: Sequence[SparseCodes], *, drop_zeros: bool = True, backend: str | None = None
) -> LatentOrder:
    """One latent order for several sets of codes over the same tokens and latents.

    Positions count through the sets one after the other; rows are tokens in each.
    """
    indices = torch.cat([codes.indices.flatten() for codes in sets])
    values = torch.cat([codes.values.detach().flatten() for codes in sets]) if drop_zeros else None
    tokens = [
        torch.arange(codes.indices.numel() // codes.k, dtype=torch.int32, device=indices.device)
        for codes in sets
    ]
    rows = torch.cat([t.repeat_interleave(codes.k) for t, codes in zip(tokens, sets, strict=True)])
    return LatentOrder(*transpose_codes(indices, values, rows, sets[0].n_latents, backend=backend))


def _from_leaves(leaves: Iterable[torch.Tensor], n_latents: int) -> SparseCodes:
    values, indices = leaves
    return SparseCodes(values, indices, n_latents)


# n_latents is part of the structure, not a leaf: tree_map sees tensors only.
_pytree.register_pytree_node(
    SparseCodes,
    lambda codes: ([codes.values, codes.indices], codes.n_latents),
    _from_leaves,
    serialized_type_name="sae_kernels.SparseCodes",
    flatten_with_keys_fn=lambda codes: (
        [(_pytree.GetAttrKey(name), getattr(codes, name)) for name in ("values", "indices")],
        codes.n_latents,
    ),
)
