"""Gated SAEs: a gate decides which latents fire, a separate magnitude how strongly."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from sae_kernels import functional
from sae_kernels.config.base import setting
from sae_kernels.config.objective import PenalisedObjective
from sae_kernels.config.sae import SAEConfig, Size
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.initialise import bounds_at, scale_encoder_
from sae_kernels.nn.objective import Reconstruction
from sae_kernels.nn.registry import Preset, register

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Context
    from sae_kernels.step.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class GatedConfig(SAEConfig):
    """Settings of a Gated SAE (Rajamanoharan et al., arXiv 2404.16014).

    Example:
        >>> GatedConfig(768, 24576).shapes()["r_mag"]
        (24576,)
    """

    architecture: ClassVar[str] = "gated"

    frozen_decoder: bool = setting(
        True,
        "whether the decoder gets no gradient from the auxiliary loss that trains the gate (true: "
        "the paper, dictionary_learning; false: SAELens)",
    )

    def shapes(self) -> dict[str, Size]:
        """Shapes of the weights and of the magnitude vectors r_mag and b_mag."""
        vector = (self.n_latents,)
        return {**super().shapes(), "r_mag": vector, "b_mag": vector}


@register
class GatedSAE(SparseAutoencoder):
    """Gated SAE (Rajamanoharan et al., arXiv 2404.16014) on one encoder product.

    With ``a = W_enc (x - b_dec)`` a latent fires where ``a + b_enc > 0`` and its code is
    ``relu(exp(r_mag) a + b_mag)``; b_enc is the paper's b_gate.

    Example:
        >>> from sae_kernels.nn import GatedSAE
        >>> sae = GatedSAE(8, 32)
        >>> sae(torch.randn(5, 8)).x_hat.shape
        torch.Size([5, 8])
    """

    config: GatedConfig
    config_class = GatedConfig
    objective_class = PenalisedObjective
    spreads: ClassVar[bool] = True
    presets: ClassVar[dict[str, Preset]] = {
        "gated": Preset("a gate decides which latents fire, L1 on the gate")
    }

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    def bounds(self) -> float:
        """0: latents are kept whose gate's pre-activation is positive."""
        return 0.0

    def activate(self, preacts: SparseCodes) -> SparseCodes:
        """Magnitudes ``relu(exp(r_mag) a + b_mag)`` of the latents whose gate is open."""

        def of(vector: torch.Tensor) -> torch.Tensor:
            return functional.gather_by_latent(vector, preacts, backend=self.backend)

        a = preacts.values - of(self.b_enc)  # select() added the gate's bias
        size = (of(self.r_mag.exp()) * a + of(self.b_mag)).relu()
        return preacts.with_values(torch.where(preacts.values <= 0, 0, size))

    def reconstructions(self, preacts: SparseCodes, context: Context) -> list[Reconstruction]:
        """The main reconstruction and the auxiliary one from the gate's pre-activations.

        Only the second trains the gate, whose step passes no gradient. The decoder gets no
        gradient from it with ``frozen_decoder``.
        """
        (main,) = super().reconstructions(preacts, context)
        trains = not self.config.frozen_decoder
        gate = Reconstruction(preacts.values.relu(), trains_decoder=trains, always=True)
        return [main, gate]

    def sparsity(
        self, preacts: SparseCodes, parts: list[Reconstruction], context: Context
    ) -> torch.Tensor:
        """The penalty on the gate's pre-activations instead of the codes."""
        return super().sparsity(preacts, parts[1:], context)

    @torch.no_grad()
    def start_training_(
        self, x: torch.Tensor, objective: PenalisedObjective, ranks: Ranks | None = None
    ) -> None:
        """Sets b_enc so that ``target_l0`` gates per token are open, and scales W_enc."""
        if objective.target_l0 is not None:
            bounds = bounds_at(self, x, objective.target_l0)
            self.b_enc.sub_(bounds * scale_encoder_(self, x, bounds, ranks))

    def sums_over_entries(self, objective: PenalisedObjective) -> bool:
        """True: a latent's code depends on its own pre-activation only."""
        return True

    def shift_preacts_(self, shift: torch.Tensor) -> None:
        """Adds the shift to the gate and, as it was multiplied, to the magnitude."""
        super().shift_preacts_(shift)
        self.b_mag.add_(self.r_mag.exp() * shift)

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """Divides both biases, b_enc and b_mag, by the scale."""
        super().fold_vectors_(scale, target_scale)
        self.b_mag.div_(scale)
