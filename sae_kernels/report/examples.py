"""Choosing the latents that a report shows, and the text on which they fire most strongly."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .by_latent import CodesByLatent, codes_by_latent
from .contexts import peak_word
from .data import LatentExamples, TokenContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.data.rows import RowSource
    from sae_kernels.nn import SparseAutoencoder

_COSINES = 1 << 22  # held at once


def decoder_cosine(W_dec: Tensor) -> Tensor:
    """The largest cosine of each decoder row to another row, [F] (0 if there is only one row).

    >>> decoder_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])).tolist()
    [1.0, 0.0, 1.0]
    """
    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    if len(rows) < 2:
        return rows.new_zeros(len(rows))
    largest, step = [], max(1, _COSINES // len(rows))
    for start in range(0, len(rows), step):
        cosine = rows[start : start + step] @ rows.T
        own = torch.arange(len(cosine), device=rows.device)
        cosine[own, own + start] = -2
        largest.append(cosine.amax(1))
    return torch.cat(largest).cpu()


def latent_examples(
    sae: SparseAutoencoder,
    source: RowSource,
    to_tokens: Callable[[list[int]], list[str]],
    *,
    n_latents: int = 12,
    n_contexts: int = 8,
    radius: int = 12,
    density: tuple[float, float] = (5e-4, 1e-2),
) -> list[LatentExamples]:
    """Chooses latents with a clear subject, with the contexts in which they fire most strongly.

    The densities are cut into bands, evenly on a log scale, and each band gives the latent whose
    strongest contexts, one a document, share their words best without all having the same one; no
    two latents have the same favourite. All codes of the source are held in memory: give it tens
    of thousands of tokens, not millions.

    Args:
        sae: the SAE.
        source: rows with tokens and documents beside them.
        to_tokens: ids to their text, as a tokenizer's convert_ids_to_tokens.
        n_latents: at most this many; a band may have none.
        n_contexts: of each latent; one that fires in fewer documents is not shown.
        radius: tokens shown on either side of the strongest.
        density: the least and the largest share of tokens on which a shown latent fires.

    Raises:
        ValueError: rows without tokens or documents.
    """
    rows = source.rows(0, source.n_tokens)
    if rows.tokens is None or rows.documents is None:
        raise ValueError("expected rows with their tokens and documents, harvest writes both")
    codes = codes_by_latent(sae, rows)
    text = to_tokens(rows.tokens.tolist())
    shares = codes.counts / source.n_tokens
    shown: dict[str, LatentExamples] = {}
    low, high = map(math.log10, density)
    for least, most in pairwise(torch.logspace(low, high, n_latents + 1).tolist()):
        candidates = []
        for latent in ((shares >= least) & (shares < most)).nonzero().flatten().tolist():
            peaks = codes.peaks(latent, rows.documents, n_contexts)
            if len(peaks) == n_contexts:
                contexts = [_context(codes, text, rows.documents, latent, p, radius) for p in peaks]
                strongest = contexts[0].activations[contexts[0].peak]
                share = float(shares[latent])
                candidates.append(LatentExamples(latent, share, strongest, contexts))
        candidates.sort(key=_clarity, reverse=True)
        for example in candidates:
            if (subject := _stems(example).most_common(1)[0][0]) not in shown:
                shown[subject] = example
                break
    return list(shown.values())[::-1]


def _stems(example: LatentExamples) -> Counter[str]:
    """Counts the beginnings of the strongest words, a crude stemming."""
    return Counter(peak_word(context).lower()[:4] for context in example.contexts)


def _clarity(example: LatentExamples) -> tuple[bool, int, float]:
    """A score of how clear a subject is: a few repeated words, then one word, then many words."""
    stems = _stems(example)
    worded = all(stem.isalpha() and len(stem) > 2 for stem in stems)
    again = sum(times for times in stems.values() if times > 1)
    weakest = min(context.activations[context.peak] for context in example.contexts)
    return worded and 2 <= len(stems) <= 4, again, weakest


def _context(
    codes: CodesByLatent, text: list[str], documents: Tensor, latent: int, peak: int, radius: int
) -> TokenContext:
    """The context of a row: the tokens of its document around it."""
    start, stop = max(0, peak - radius), peak + radius + 1
    same = (documents[start:stop] == documents[peak]).nonzero().flatten() + start
    first, last = int(same[0]), int(same[-1]) + 1
    activations = codes.activations(latent, first, last)
    return TokenContext(text[first:last], activations, peak - first)
