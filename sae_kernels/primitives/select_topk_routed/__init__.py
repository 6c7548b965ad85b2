"""select_topk_routed: select_topk of each token among the latents of its own expert.

The F latents belong to E experts, equal parts one after the other. Expert e's tokens are
``tokens[starts[e]:starts[e + 1]]``, and only its latents are multiplied with them; what is kept has
the latents' numbers among all F, in the order of :mod:`~sae_kernels.primitives.select_topk`. With
one expert the result is select_topk's, bit for bit.
"""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator


def _check(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    tokens: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    checks.encoder(x, W, b)
    checks.shape("tokens", tokens, [x.shape[0]], "every token once, by expert")
    checks.shape("starts", starts, ["E + 1"], "where each expert's tokens start")
    for name, tensor in (("tokens", tokens), ("starts", starts)):
        checks.indices(name, tensor)
    checks.same_device(x=x, tokens=tokens, starts=starts)
    n_experts, n_latents = starts.shape[0] - 1, W.shape[0]
    if n_experts < 1 or n_latents % n_experts:
        raise ValueError(
            f"starts: expected a number of experts that divides n_latents = {n_latents}, got "
            f"{n_experts}"
        )
    if not 1 <= k <= n_latents // n_experts:
        raise ValueError(
            f"k: expected 1 <= k <= {n_latents // n_experts}, the latents of one of the "
            f"{n_experts} experts, got {k}"
        )


def _fake(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    tokens: torch.Tensor,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.new_empty((x.shape[0], k), dtype=checks.accumulator(x.dtype))
    return values, x.new_empty((x.shape[0], k), dtype=torch.int32)


select_topk_routed = Operator(
    "select_topk_routed(Tensor x, Tensor W, Tensor? b, SymInt k, Tensor tokens, Tensor starts,"
    " str backend) -> (Tensor, Tensor)",
    _check,
    _fake,
)
