"""select_topk_routed on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives.select_topk import cpu

if TYPE_CHECKING:
    import torch

note = cpu.note


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    tokens: torch.Tensor,
    starts: torch.Tensor,
    narrow: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel of the selection among all latents on blocks of one expert each."""
    return cpu.run(x, W, b, k, None, narrow, routes=cpu.Routes(tokens, starts))
