"""select_topk on the host kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.tensors import packed


class Routes(NamedTuple):
    """Which tokens meet which latents; see :mod:`sae_kernels.primitives.select_topk_routed`."""

    tokens: torch.Tensor
    starts: torch.Tensor


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    routes: Routes | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs csrc/cpu/select_topk.cpp."""
    x, W = packed(x), packed(W)
    b, rank_scale = packed(b), packed(rank_scale)
    tokens, starts = (None, None) if routes is None else map(packed, routes)
    n_experts = 1 if starts is None else starts.shape[0] - 1
    sizes = (x.shape[0], x.shape[1], W.shape[0], k)
    values = x.new_empty((x.shape[0], k), dtype=checks.accumulator(x.dtype))
    indices = x.new_empty((x.shape[0], k), dtype=torch.int32)
    isa, code, threads = cpu.isa(), cpu.code(x.dtype), cpu.threads()
    bytes_needed = cpu.module().select_topk_workspace(
        isa, code, rank_scale is not None, *sizes, n_experts, threads
    )
    workspace = torch.empty(bytes_needed, dtype=torch.uint8)
    valid = cpu.module().select_topk(
        isa,
        code,
        cpu.address(x),
        cpu.address(W),
        cpu.address(b),
        cpu.address(rank_scale),
        cpu.address(values),
        cpu.address(indices),
        *sizes,
        cpu.address(tokens),
        cpu.address(starts),
        n_experts,
        cpu.address(workspace),
        threads,
    )
    if routes is not None and not valid:
        checks.routes(*routes)
    return values, indices
