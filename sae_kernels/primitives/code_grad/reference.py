"""code_grad in plain torch: the specification."""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks


def run(
    grad: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    group_ends: torch.Tensor | None,
) -> torch.Tensor:
    """Gathers the K rows of every token and multiplies them with the token's gradient."""
    checks.latents_in_range(indices, W.shape[0])
    checks.groups_split_latents(group_ends, W.shape[0])
    rows = W[indices.long()].to(grad.dtype)  # [B, K, D]
    if group_ends is None:
        return (rows * grad[:, None]).sum(-1)
    group = torch.bucketize(indices, group_ends, right=True)
    token = torch.arange(indices.shape[0], device=grad.device)[:, None]
    return (rows * grad[group, token]).sum(-1)
