"""transpose_codes in Triton: torch sorts the latents, and a kernel makes the index of the order.

An index outside [0, n_latents) cannot raise without waiting for the GPU: such an entry is left out,
and `decode` shows it as NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_kernels.primitives.tensors import packed

_BLOCK = 256


@triton.jit
def _index_codes(
    latents,
    order,
    row_ids,
    offsets,
    entries,
    rows,
    n,
    per_row,
    n_latents,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A binary search for each latent's first entry: filling the gap before an entry instead would
    # leave one lane with all the latents that nothing fired.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(latents + at, mask=at < n, other=n_latents)
    entry = tl.load(order + at, mask=latent < n_latents, other=0).to(tl.int32)
    if row_ids is None:
        row = entry // per_row
    else:
        row = tl.load(row_ids + entry, mask=latent < n_latents, other=0)
    tl.store(entries + at, entry, mask=at < n)
    tl.store(rows + at, row, mask=at < n)
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + n
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        searching = (low < high) & (at <= n_latents)
        below = tl.load(latents + middle, mask=searching, other=n_latents) < at
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    tl.store(offsets + at, low, mask=at <= n_latents)


def run(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorts the latents stably, dropped entries last, and runs the kernel."""
    n = indices.numel()
    offsets = indices.new_zeros(n_latents + 1)
    entries, rows = indices.new_empty(n), indices.new_empty(n)
    if n == 0:
        return offsets, entries, rows
    kept = (indices >= 0) & (indices < n_latents)
    if values is not None:
        kept &= values != 0
    latents, order = torch.where(kept, indices, n_latents).flatten().sort(stable=True)
    _index_codes[(-(-max(n, n_latents + 1) // _BLOCK),)](
        latents,
        order,
        packed(row_ids),
        offsets,
        entries,
        rows,
        n,
        1 if row_ids is not None else indices.shape[1],
        n_latents,
        STEPS=n.bit_length(),
        BLOCK=_BLOCK,
    )
    return offsets, entries, rows
