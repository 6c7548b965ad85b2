"""code_grad in plain torch: the specification."""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.decode.reference import entry_tokens


def run(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gathers the rows of every token and multiplies them with the token's gradient."""
    checks.latents_in_range(indices, W.shape[0])
    checks.offsets_split_entries(offsets, indices.numel())
    checks.groups_split_latents(group_ends, W.shape[0])
    rows = W[indices.long()].to(grad.dtype)  # [B, K, D] or [N, D]
    token = torch.zeros_like(indices, dtype=torch.int64)
    if offsets is None:
        token += torch.arange(indices.shape[0], device=grad.device)[:, None]
    else:
        token[: int(offsets[-1])] = entry_tokens(offsets)
    if group_ends is None:
        return (rows * grad[token]).sum(-1)
    group = torch.bucketize(indices, group_ends, right=True)
    return (rows * grad[group, token]).sum(-1)
