"""decode_residual on the host kernels: decode's kernel in its fused form."""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.decode import cpu as decode


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    drop_zeros: bool,
    group_ends: torch.Tensor | None = None,
    group_weights: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    blocks: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/decode.cpp with a target."""
    groups = () if group_ends is None else (group_ends.shape[0],)
    tokens = checks.n_tokens(values, offsets)
    e = values.new_empty((*groups, tokens, W.shape[1]))
    sse = values.new_empty((*groups, tokens))
    # Past the last offset nothing is an entry: zero, so that nobody reads what memory held.
    grad = torch.zeros_like(values) if offsets is not None else torch.empty_like(values)
    codes = (values, indices, offsets)
    results = (e, sse, grad)
    decode.launch(codes, W, b_dec, group_ends, (group_weights, target), results, drop_zeros, blocks)
    return e, sse, grad
