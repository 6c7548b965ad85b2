"""select_threshold on the host kernels."""

from __future__ import annotations

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.tensors import packed


def note(dtype: torch.dtype) -> str | None:
    """What `explain` adds about calls of this dtype."""
    return cpu.encoder_note(dtype)


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    bounds: torch.Tensor,
    narrow: torch.Tensor | None = None,
    screening: cpu.Screening | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/select_threshold.cpp, then allocates as much as it found.

    ``screening`` as of select_topk's.
    """
    if screening is None:
        screening = cpu.screens(x.shape[0], x.shape[1], W.shape[0], x.dtype)
    operands = [packed(t) for t in (x, W, b, bounds, narrow)]
    sizes = (*x.shape, W.shape[0], screening)
    found = cpu.run_with_workspace("select_threshold", cpu.code(x.dtype), *operands, *sizes)
    values = x.new_empty(found.count(), dtype=accumulator(x.dtype))
    indices = x.new_empty(found.count(), dtype=torch.int32)
    offsets = x.new_empty(x.shape[0] + 1, dtype=torch.int32)
    found.write(values, indices, offsets)
    return values, indices, offsets
