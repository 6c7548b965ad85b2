"""What the latent browser shows of every latent, as arrays: small enough for one page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .by_latent import CodesByLatent, codes_by_latent
from .contexts import text_pieces

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from sae_kernels.data.rows import RowSource
    from sae_kernels.nn import SparseAutoencoder

    # Token ids and changes of logits [F, k] of the promoted, then of the suppressed.
    Effects: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

CONTEXTS, RADIUS, BINS, NEIGHBOURS = 6, 8, 16, 5
NOTHING = -1  # in place of a row or a latent
_PAIRS = 1 << 22  # counts of pairs of latents held at once


@dataclass(frozen=True, eq=False)
class LatentTable:
    """All latents of an SAE on a sample of tokens.

    Attributes:
        words: the text of every token that occurs, with the space before it.
        stream: int64 [N], the sample: indices into ``words``.
        documents: int64 [n_documents], the row where each document begins, ascending.
        counts: int64 [F], tokens on which each latent fires.
        low, high: [F], the histogram's ends: 0, or its smallest activation where that is negative,
            and its largest.
        histogram: int64 [F, 16], activations in each sixteenth of that range.
        peaks: int64 [F, 6], the rows of its strongest activations, one a document; -1 for none.
        activations: [F, 6, 17], its activations around each peak, 0 outside the document.
        neighbours: int64 [F, 5], the latents that fire with it most; -1 for none.
        together: [F, 5], n_ij / sqrt(n_i n_j) of the tokens on which both and each fire.
        promoted, suppressed: int64 [F, k], indices into ``words``, or None without a causal model.
        promoted_by, suppressed_by: [F, k], the changes of their logits.
    """

    words: list[str]
    stream: Tensor
    documents: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor
    histogram: Tensor
    peaks: Tensor
    activations: Tensor
    neighbours: Tensor
    together: Tensor
    promoted: Tensor | None = None
    promoted_by: Tensor | None = None
    suppressed: Tensor | None = None
    suppressed_by: Tensor | None = None


def latent_table(
    sae: SparseAutoencoder,
    source: RowSource,
    to_tokens: Callable[[list[int]], list[str]],
    effects: Effects | None = None,
) -> LatentTable:
    """Collects what the latent browser shows; all codes of the source are held in memory.

    Args:
        sae: the SAE.
        source: rows with tokens and documents beside them; tens of thousands.
        to_tokens: ids to their text, as a tokenizer's convert_ids_to_tokens.
        effects: what :func:`sae_kernels.interventions.latent_effects` says of all latents.

    Raises:
        ValueError: rows without tokens or documents.
    """
    rows = source.rows(0, source.n_tokens)
    if rows.tokens is None or rows.documents is None:
        raise ValueError("expected rows with their tokens and documents, harvest writes both")
    codes, ids = codes_by_latent(sae, rows), rows.tokens.long().cpu()
    groups = [ids] if effects is None else [ids, effects[0].cpu(), effects[2].cpu()]
    used, places = torch.cat([group.flatten() for group in groups]).unique(return_inverse=True)
    parts = [
        part.view(group.shape)
        for part, group in zip(places.split([g.numel() for g in groups]), groups, strict=True)
    ]
    document = rows.documents.long().cpu()
    begins = torch.cat([torch.ones(1, dtype=torch.bool), document[1:] != document[:-1]])
    number = begins.cumsum(0) - 1
    low, high, histogram = _histograms(codes)
    peaks = _peaks(codes, number)
    neighbours, together = _neighbours(codes, source.n_tokens)
    told = {}
    if effects is not None:
        told = {"promoted": parts[1], "promoted_by": effects[1].cpu()}
        told |= {"suppressed": parts[2], "suppressed_by": effects[3].cpu()}
    return LatentTable(
        words=[gap + text for gap, text in text_pieces(["", *to_tokens(used.tolist())])[1:]],
        stream=parts[0],
        documents=begins.nonzero().flatten(),
        counts=codes.counts,
        low=low,
        high=high,
        histogram=histogram,
        peaks=peaks,
        activations=_around(codes, peaks, number),
        neighbours=neighbours,
        together=together,
        **told,
    )


def _histograms(codes: CodesByLatent) -> tuple[Tensor, Tensor, Tensor]:
    """The ends [F] of each latent's histogram and its counts [F, 16]."""
    latents = codes.indices[codes.entries].long()
    values = codes.values[codes.entries].float()
    low, high = torch.zeros(len(codes.counts)), torch.zeros(len(codes.counts))
    low.scatter_reduce_(0, latents, values, "amin")
    high.scatter_reduce_(0, latents, values, "amax")
    place = (values - low[latents]) / (high - low)[latents] * BINS
    bins = place.nan_to_num(0).long().clamp_(0, BINS - 1)
    counts = torch.bincount(latents * BINS + bins, minlength=len(low) * BINS)
    return low, high, counts.view(-1, BINS)


def _peaks(codes: CodesByLatent, document: Tensor) -> Tensor:
    """The rows [F, 6] of each latent's strongest activations, one a document."""
    latents, rows = codes.indices[codes.entries].long(), codes.rows[codes.entries]
    key = latents * (int(document[-1]) + 1) + document[rows]
    order = key.argsort(stable=True)  # within a document the strongest stays first
    first = torch.ones(len(key), dtype=torch.bool)
    first[order[1:]] = key[order[1:]] != key[order[:-1]]
    latents, rows = latents[first], rows[first]
    counts = torch.bincount(latents, minlength=len(codes.counts))
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[latents]
    kept = rank < CONTEXTS
    peaks = torch.full((len(counts), CONTEXTS), NOTHING)
    peaks[latents[kept], rank[kept]] = rows[kept]
    return peaks


def _around(codes: CodesByLatent, peaks: Tensor, document: Tensor) -> Tensor:
    """Each latent's activations [F, 6, 17] on the rows around its peaks."""
    F, N = len(codes.counts), len(document)
    if not len(codes.values):
        return torch.zeros(F, CONTEXTS, 2 * RADIUS + 1)
    keys, order = (codes.rows * F + codes.indices).sort()
    rows = peaks[..., None] + torch.arange(-RADIUS, RADIUS + 1)
    inside = (peaks[..., None] != NOTHING) & (rows >= 0) & (rows < N)
    rows = rows.clamp(0, N - 1)
    inside &= document[rows] == document[peaks.clamp(min=0)][..., None]
    wanted = rows * F + torch.arange(F)[:, None, None]
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return codes.values[order[place]].float().where(inside & (keys[place] == wanted), 0)


def _neighbours(codes: CodesByLatent, n_rows: int) -> tuple[Tensor, Tensor]:
    """The latents [F, 5] that fire with each latent most, and how much, 0 to 1."""
    F, k = len(codes.counts), min(NEIGHBOURS, len(codes.counts) - 1)
    fired = (codes.values != 0).nonzero().flatten()
    indices, lengths = (
        codes.indices[fired].long(),
        torch.bincount(codes.rows[fired], minlength=n_rows),
    )
    starts = lengths.cumsum(0) - lengths
    norms = codes.counts.float().sqrt()
    neighbours = torch.full((F, NEIGHBOURS), NOTHING)
    together = torch.zeros(F, NEIGHBOURS)
    step = max(1, _PAIRS // F)
    for first in range(0, F, step):
        last = min(F, first + step)
        begin = int(codes.ends[first] - codes.counts[first])
        rows = codes.rows[codes.entries[begin : int(codes.ends[last - 1])]]
        own = torch.arange(last - first).repeat_interleave(codes.counts[first:last])
        n = lengths[rows]  # every entry of these rows, beside the latent whose row it is
        every = torch.arange(int(n.sum())) + (starts[rows] - (n.cumsum(0) - n)).repeat_interleave(n)
        pairs = own.repeat_interleave(n) * F + indices[every]
        both = torch.bincount(pairs, minlength=(last - first) * F).view(-1, F).float()
        both[torch.arange(last - first), torch.arange(first, last)] = 0
        both /= (norms[first:last, None] * norms).clamp_(min=1)
        best = both.topk(k)
        together[first:last, :k] = best.values
        neighbours[first:last, :k] = best.indices.where(best.values > 0, NOTHING)
    return neighbours, together
