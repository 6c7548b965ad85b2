"""The codes of all rows of a source, sorted by latent and then by strength."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.codes import SparseCodes

if TYPE_CHECKING:
    from sae_kernels.data.rows import Rows
    from sae_kernels.nn import SparseAutoencoder

_BATCH = 4096


class CodesByLatent(NamedTuple):
    """The codes of all rows, with the entries that fired in the order of latents.

    Attributes:
        values, indices: [N], row after row.
        rows: int64 [N], ascending.
        entries: int64 [n_fired], positions in the codes: latent after latent, the strongest first.
        counts: int64 [F], entries that fired.
        ends: int64 [F], where a latent's entries end.
    """

    values: Tensor
    indices: Tensor
    rows: Tensor
    entries: Tensor
    counts: Tensor
    ends: Tensor

    def top(self, latent: int) -> tuple[Tensor, Tensor]:
        """The values and rows of a latent's entries, strongest first."""
        end, count = int(self.ends[latent]), int(self.counts[latent])
        entries = self.entries[end - count : end]
        return self.values[entries], self.rows[entries]

    def activations(self, latent: int, first: int, last: int) -> list[float]:
        """A latent's activations on the rows from ``first`` up to ``last``."""
        start, stop = torch.searchsorted(self.rows, torch.tensor([first, last])).tolist()
        here = self.indices[start:stop] == latent
        result = torch.zeros(last - first)
        result[self.rows[start:stop][here] - first] = self.values[start:stop][here].float()
        return result.tolist()

    def peaks(self, latent: int, documents: Tensor, n: int) -> list[int]:
        """The rows where a latent fires most strongly, one per document."""
        peaks: dict[int, int] = {}
        rows = self.top(latent)[1]
        for row, document in zip(rows.tolist(), documents[rows].tolist(), strict=True):
            peaks.setdefault(document, row)
            if len(peaks) == n:
                break
        return list(peaks.values())


@torch.inference_mode()
def codes_by_latent(sae: SparseAutoencoder, rows: Rows) -> CodesByLatent:
    """Encodes rows and sorts their codes by latent; all of them are held in memory."""
    device = sae.W_enc.device
    codes = SparseCodes.cat(
        [sae.encode(x.to(device).float()) for x in rows.activations.split(_BATCH)]
    )
    values, indices = codes.values.flatten().cpu(), codes.indices.flatten().cpu()
    tokens = codes.tokens.flatten().long().cpu()
    fired = (values != 0).nonzero().flatten()
    by_value = fired[values[fired].argsort(descending=True, stable=True)]
    latents = indices[by_value]
    entries = by_value[latents.argsort(stable=True)]
    counts = torch.bincount(latents, minlength=sae.config.n_latents)
    return CodesByLatent(values, indices, tokens, entries, counts, counts.cumsum(0))
