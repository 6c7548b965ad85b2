"""When an encoder with thresholds changes over from dense products to entries."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from sae_kernels.step.fused_step import DENSE_FROM

if TYPE_CHECKING:
    import torch


class Density:
    """The static rule for encoders with thresholds: sparse while few latents fire.

    The kept part of all entries decides for the next call: above a twentieth, as in
    :class:`~sae_kernels.step.FusedStep`, dense products are faster.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[torch.nn.Module, float] = weakref.WeakKeyDictionary()

    def why_dense(self, sae: torch.nn.Module) -> str | None:
        """Why the next call of an SAE is dense, or None; the first is, as nothing is known yet."""
        if self._kept.get(sae, 1.0) > DENSE_FROM:
            return f"more than {DENSE_FROM:.0%} of the latents fire, or the first step"
        return None

    def saw(self, sae: torch.nn.Module, acts: torch.Tensor) -> None:
        """Notes the part of a call's codes that fired."""
        entries = getattr(acts, "entries", None)
        n = acts.count_nonzero() if entries is None else entries.values.numel()
        self._kept[sae] = float(n) / max(1, acts.numel())
