"""decode in plain torch: the specification."""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.terms import tree_sum, values_by_block


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
    blocks: int = 1,
) -> torch.Tensor:
    """Gathers the rows of every token and sums them, block by block of latents."""
    if blocks > 1:
        each = values_by_block(values, indices, W.shape[0], blocks)
        total = tree_sum([run(own, indices, W, None, group_ends, offsets) for own in each])
        return total if b_dec is None else total + b_dec
    checks.latents_in_range(indices, W.shape[0])
    checks.offsets_split_entries(offsets, indices.numel())
    checks.groups_split_latents(group_ends, W.shape[0])
    rows = W[indices.long()].to(values.dtype)  # [B, K, D] or [N, D]
    weighted = torch.where((values == 0)[..., None], 0, values[..., None] * rows)
    ends = [W.shape[0]] if group_ends is None else group_ends.tolist()
    tokens = checks.n_tokens(values, offsets)
    prefixes = []
    for end in ends:
        part = weighted * (indices < end)[..., None]
        prefixes.append(part.sum(1) if offsets is None else sum_by_token(part, offsets, tokens))
    out = torch.stack(prefixes)
    if b_dec is not None:
        out = out + b_dec
    return out[0] if group_ends is None else out


def sum_by_token(entries: torch.Tensor, offsets: torch.Tensor, tokens: int) -> torch.Tensor:
    """Adds up the entries [N, D] of each token, in their order."""
    out = entries.new_zeros((tokens, *entries.shape[1:]))
    return out.index_add_(0, entry_tokens(offsets), entries[: int(offsets[-1])])


def entry_tokens(offsets: torch.Tensor) -> torch.Tensor:
    """The token of each entry, int64 [offsets[-1]]."""
    tokens = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return tokens.repeat_interleave(offsets.diff().long())
