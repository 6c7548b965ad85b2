"""decode in plain torch: the specification."""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
) -> torch.Tensor:
    """Gathers the K rows of every token and sums them."""
    checks.latents_in_range(indices, W.shape[0])
    checks.groups_split_latents(group_ends, W.shape[0])
    rows = W[indices.long()].to(values.dtype)  # [B, K, D]
    weighted = torch.where((values == 0)[..., None], 0, values[..., None] * rows)
    ends = [W.shape[0]] if group_ends is None else group_ends.tolist()
    prefixes = [(weighted * (indices < end)[..., None]).sum(1) for end in ends]
    out = torch.stack(prefixes)
    if b_dec is not None:
        out = out + b_dec
    return out[0] if group_ends is None else out
