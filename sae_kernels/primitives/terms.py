"""Sums in parts: weight gradients that are never materialised, blocks of latents."""

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sae_kernels.primitives import checks


class Term(NamedTuple):
    """One summand of a weight gradient: codes in latent order times rows of a source.

    The gradient of latent ``f`` gets ``coef[entries[j]] * source[rows[j]]`` for every ``j`` in
    ``[offsets[f], offsets[f + 1])``, added in that order.

    Attributes:
        offsets: int32 [F + 1]; a slice of them is the term of some latents.
        entries: int32 [N], positions in the flattened codes.
        rows: int32 [N], rows of the source.
        coef: fp32 or fp64 [N], by entry.
        source: [R, width] of any operand dtype; ``None`` stands for rows of ones.
    """

    offsets: torch.Tensor
    entries: torch.Tensor
    rows: torch.Tensor
    coef: torch.Tensor
    source: torch.Tensor | None


class Gradient(NamedTuple):
    """The gradient of an [F, width] matrix as a sum of terms, penalties and dense rows.

    Attributes:
        terms: what the codes contribute.
        row_coef: [F], adds ``row_coef[f] * w_f / |w_f|``: the gradient of a penalty on row norms;
            or [F, S], the same for each of S equal parts of a row (a crosscoder's layers).
        dense: [A, width], whole gradient rows of a few latents.
        dense_latents: int32 [A], the latents of ``dense``, each at most once; -1 marks an unused
            row.
    """

    terms: Sequence[Term] = ()
    row_coef: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    dense_latents: torch.Tensor | None = None

    @property
    def row_parts(self) -> int:
        """S of ``row_coef``: parts of a row with a coefficient each."""
        return 1 if self.row_coef is None or self.row_coef.dim() < 2 else self.row_coef.shape[1]

    @classmethod
    def whole(cls, dense: torch.Tensor, row_coef: torch.Tensor | None = None) -> "Gradient":
        """A gradient that is given as a matrix [F, width]."""
        every = torch.arange(dense.shape[0], dtype=torch.int32, device=dense.device)
        return cls(row_coef=row_coef, dense=dense, dense_latents=every)

    def check(self, n_latents: int, width: int, dtype: torch.dtype) -> None:
        """Raises ValueError or TypeError if it cannot be the gradient of such a matrix."""
        for i, term in enumerate(self.terms):
            _check_term(f"terms[{i}]", term, n_latents, width)
            checks.same_device(**{f"terms[{i}]": term.coef, "row_coef": self.row_coef})
        checks.same_device(
            row_coef=self.row_coef, dense=self.dense, dense_latents=self.dense_latents
        )
        parts = [] if self.row_coef is None or self.row_coef.dim() < 2 else [self.row_parts]
        meaning = "one coefficient per latent, or per part of its row"
        checks.shape("row_coef", self.row_coef, [n_latents, *parts], meaning)
        if self.row_parts < 1 or width % self.row_parts:
            raise ValueError(
                f"row_coef: expected a divisor of the width {width} as parts of a row, got "
                f"{self.row_parts}"
            )
        checks.shape("dense", self.dense, ["A", width], "rows as wide as the matrix")
        checks.dtype("row_coef", self.row_coef, (dtype,))
        checks.dtype("dense", self.dense, (dtype,))
        if (self.dense is None) != (self.dense_latents is None):
            raise ValueError("dense and dense_latents: expected both or neither, got one of them")
        if self.dense is not None and self.dense_latents is not None:
            rows = self.dense.shape[0]
            checks.shape("dense_latents", self.dense_latents, [rows], "a latent per row of dense")
            checks.indices("dense_latents", self.dense_latents)


def _check_term(name: str, term: Term, n_latents: int, width: int) -> None:
    checks.shape(f"{name}.offsets", term.offsets, [n_latents + 1], "one more than n_latents")
    checks.shape(f"{name}.entries", term.entries, ["N"], "a position per entry")
    for field in ("rows", "coef"):
        shape = list(term.entries.shape)
        checks.shape(f"{name}.{field}", getattr(term, field), shape, "one per entry")
    for field in ("offsets", "entries", "rows"):
        checks.indices(f"{name}.{field}", getattr(term, field))
    checks.shape(f"{name}.source", term.source, ["R", width], "rows as wide as the matrix")
    checks.dtype(f"{name}.coef", term.coef, (torch.float32, torch.float64))
    checks.dtype(f"{name}.source", term.source, checks.OPERAND_DTYPES)
    checks.same_device(**term._asdict())


def listed_entries(term: Term) -> tuple[slice, torch.Tensor]:
    """Which of a term's places its offsets span, and the latent of each of them."""
    latents = torch.arange(term.offsets.numel() - 1, device=term.offsets.device)
    listed = slice(int(term.offsets[0]), int(term.offsets[-1]))
    return listed, latents.repeat_interleave(term.offsets.diff().long())


def without_zeros(term: Term) -> Term:
    """The term without the entries whose coefficients are 0."""
    listed, latents = listed_entries(term)
    kept = term.coef.flatten()[term.entries[listed].long()] != 0
    counts = latents[kept].bincount(minlength=term.offsets.numel() - 1)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    entries, rows = term.entries[listed][kept], term.rows[listed][kept]
    return term._replace(offsets=offsets, entries=entries, rows=rows)


def tree_sum(
    parts: Sequence[torch.Tensor],
    add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = operator.add,
) -> torch.Tensor:
    """The sum of tensors in the order of a binary tree; by operator.iadd in the tensors' memory.

    A tree over a power of two of parts is one over any smaller power of two of sums of neighbours:
    whoever has added up which of them, the bits are the same.

    Example:
        >>> tree_sum([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)])
        tensor(7.)
    """
    while len(parts) > 1:
        pairs = [add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = [*pairs, *parts[len(pairs) * 2 :]]
    return parts[0]


def values_by_block(
    values: torch.Tensor, indices: torch.Tensor, n_latents: int, blocks: int
) -> list[torch.Tensor]:
    """The values of codes for each of equal blocks of latents: 0 where an entry is of another."""
    block = indices // (n_latents // blocks)
    return [torch.where(block == v, values, 0) for v in range(blocks)]
