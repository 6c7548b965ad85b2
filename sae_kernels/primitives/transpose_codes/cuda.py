"""transpose_codes in CUDA C++: a stable radix sort of the codes by latent.

It takes 8 bytes an entry of workspace and 2 MiB. An index outside [0, n_latents) cannot raise
without waiting for the GPU: such an entry is left out, and `decode` shows it as NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.backends import cuda
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    import torch

# As csrc/cuda/transpose_codes.cuh has them.
_THREADS, _WARPS = 256, 8
_DIGIT_BITS, _DIGITS = 8, 256
_MOST_PARTS = 2048  # a warp each: two to four times what a GPU has running at once
_FEWEST_CODES = 256  # of a part


def run(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs csrc/cuda/transpose_codes.cu, as many passes as a latent has digits."""
    indices, n = indices.contiguous(), indices.numel()
    values = packed(values)
    row_ids = packed(row_ids)
    offsets = indices.new_zeros(n_latents + 1)
    entries, rows = indices.new_zeros(n), indices.new_zeros(n)
    if n == 0:
        return offsets, entries, rows
    blocks = -(-min(_MOST_PARTS, -(-n // _FEWEST_CODES)) // _WARPS)
    parts = blocks * _WARPS
    counts, totals = indices.new_empty((_DIGITS, parts)), indices.new_empty(_DIGITS)
    kept = indices.new_empty(1)
    passes = max(1, -(-(n_latents - 1).bit_length() // _DIGIT_BITS))
    # Passes write to and fro. The last must end in `entries`; `rows`, which is written after it,
    # lends its memory.
    latents = indices.new_empty((min(passes, 2), n))
    codes: tuple[torch.Tensor | int | None, ...]
    codes = (indices, None, values, 0 if values is None else values.element_size() // 4)
    for left in reversed(range(passes)):
        into = (latents[left % 2], (entries, rows)[left % 2])
        source = (*codes, n, kept, n_latents, _DIGIT_BITS * (passes - 1 - left))
        cuda.launch("transpose_count", blocks, _THREADS, 0, *source, counts, parts)
        cuda.launch("transpose_sum", _DIGITS, _THREADS, 0, counts, totals, parts)
        cuda.launch("transpose_move", blocks, _THREADS, 0, *source, counts, totals, parts, *into)
        codes = (*into, None, 0)
    blocks = -(-max(n, n_latents + 1) // _THREADS)
    per_row = 1 if row_ids is not None else indices.shape[1]
    arguments = (latents[0], kept, entries, row_ids, per_row, n_latents, offsets, rows)
    cuda.launch("transpose_index", blocks, _THREADS, 0, *arguments)
    return offsets, entries, rows
