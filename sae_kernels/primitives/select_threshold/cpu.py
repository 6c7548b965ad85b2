"""select_threshold on the host kernels."""

from __future__ import annotations

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives.checks import accumulator
from sae_kernels.tensors import packed


def run(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/select_threshold.cpp, then makes room for what it found."""
    alive = [packed(t) for t in (x, W, b, bounds)]
    sizes = (x.shape[0], x.shape[1], W.shape[0])
    isa, code, threads = cpu.isa(), cpu.code(x.dtype), cpu.threads()
    bytes_needed = cpu.module().select_threshold_workspace(isa, code, *sizes, threads)
    workspace = torch.empty(bytes_needed, dtype=torch.uint8)
    addresses = (cpu.address(t) for t in alive)
    found = cpu.module().select_threshold(
        isa, code, *addresses, *sizes, cpu.address(workspace), threads
    )
    values = x.new_empty(found.count(), dtype=accumulator(x.dtype))
    indices = x.new_empty(found.count(), dtype=torch.int32)
    offsets = x.new_empty(x.shape[0] + 1, dtype=torch.int32)
    found.write(cpu.address(values), cpu.address(indices), cpu.address(offsets))
    return values, indices, offsets
