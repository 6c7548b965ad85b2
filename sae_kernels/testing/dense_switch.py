"""A Switch SAE's router and codes, densely: all experts are computed and all but one masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.testing.dense_selection import rank_order, topk_kept

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.testing.dense_spec import DenseSpec


class Routed(NamedTuple):
    """Routing of a batch by a Switch SAE.

    Attributes:
        probabilities: [B, E], without a column for a shared expert.
        chosen: int64 [B], the chosen column of ``probabilities``.
        gates: [B, F], factor of each code.
        allowed: bool [B, F], the latents of the token's experts.
    """

    probabilities: Tensor
    chosen: Tensor
    gates: Tensor
    allowed: Tensor

    def balance(self) -> Tensor:
        """Load-balance loss ``E sum_i F_i P_i`` over the routed experts; no gradient through F."""
        E = self.probabilities.shape[1]
        F = torch.nn.functional.one_hot(self.chosen, E).to(self.probabilities).mean(0)
        return E * (F * self.probabilities.mean(0)).sum()


def routed(spec: DenseSpec, parameters: Mapping[str, Tensor], x: Tensor, F: int) -> Routed:
    """The router's decisions on tokens [B, d_in]: ``softmax((x - b_router) W_router^T)``.

    The first of the largest logits wins, NaN before all (arXiv 2410.08201).
    """
    logits = (x - parameters["b_router"]) @ parameters["W_router"].T
    probabilities = logits.softmax(1)
    chosen = rank_order(logits.detach())[:, :1]
    gate = probabilities.gather(1, chosen) if spec.gated else torch.ones_like(logits[:, :1])
    owner = torch.arange(F) // (F // spec.n_experts)  # a shared expert is the first
    shared = (owner == 0) & spec.shared_expert
    allowed = (owner == chosen + int(spec.shared_expert)) | shared
    return Routed(probabilities, chosen[:, 0], torch.where(shared, 1.0, gate), allowed)


def switch_codes(routes: Routed, h: Tensor, k: int) -> Tensor:
    """[B, F]: ``gate relu(h)`` of the k latents with the largest ``gate h`` among those allowed."""
    key = torch.where(routes.allowed, routes.gates * h, -torch.inf).detach()
    return torch.where(topk_kept(key, k) & routes.allowed, routes.gates * h.relu(), 0.0)
