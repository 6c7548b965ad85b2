"""Training on activations: one of the two routes, a batch of rows a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.errors import NonFiniteError
from sae_kernels.nn import ReLUSAE, SwitchSAE
from sae_kernels.step.autograd_step import ComposableStep
from sae_kernels.step.fused_step import FusedStep
from sae_kernels.step.objective import k_at
from sae_kernels.step.router import largest_load
from sae_kernels.training.fresh import split
from sae_kernels.training.shrinkage import fit_scales, scale_latents_
from sae_kernels.training.training import Training

if TYPE_CHECKING:
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.data.batches import RowSource
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.fused_step import StepResult


class OnActivations(Training[torch.Tensor]):
    """Trains an SAE in place on rows of activations.

    Args:
        sae: fresh, or with the weights of a checkpoint.
        config: the settings.
        source: all rows, for the shrinkage fix; None where there is only a stream.
    """

    def __init__(
        self, sae: SparseAutoencoder, config: TrainConfig, source: RowSource | None
    ) -> None:
        if config.fix_shrinkage and source is None:
            raise ValueError(
                "fix_shrinkage: expected false on a stream (it fits stored activations), got true"
            )
        make = FusedStep if config.route == "fused" else ComposableStep
        self.step: FusedStep | ComposableStep = make(sae, config)
        super().__init__(self.step)
        self.source = source
        self._skipped = torch.zeros((), dtype=torch.int64, device=sae.W_enc.device)
        self._last: StepResult | None = None

    @property
    def skipped(self) -> int:
        """Steps skipped because something was not finite; waits for the device."""
        return int(self._skipped)

    def set_skipped(self, count: int) -> None:
        """Goes on counting from here."""
        self._skipped.fill_(count)

    def take(self, batch: torch.Tensor) -> None:
        """One step on raw rows; a transcoder's targets stand to the right of its inputs."""
        device = self.sae.W_enc.device
        x, target = split(batch.to(device), self.sae.config)
        k = k_at(self.sae, self.config, self.made)
        self._last = self.step(x, lr=self.learning_rate(self.made), k=k, target=target)
        self._skipped += self._last.skipped
        self.made += 1
        self.tokens += len(batch)
        # On the CPU looking costs nothing; elsewhere it would stall the step.
        looks = self.config.on_nonfinite == "stop" and (self.due or device.type == "cpu")
        if looks and self._skipped:
            raise NonFiniteError.in_step(self.made - 1)

    def measured(self) -> dict[str, float]:
        """Loss, FVU, L0 and AuxK's loss of the last step; a Switch SAE's largest load."""
        assert self._last is not None
        values = self._last._asdict()
        found = {name: float(values[name]) for name in ("loss", "fvu", "l0", "aux_loss")}
        if isinstance(self.sae, SwitchSAE):
            found["largest_load"] = float(largest_load(self.sae, self._last.fired))
        return found

    def settle(self) -> None:
        """Fits the scales of the latents, where config asks for it."""
        if self.config.fix_shrinkage:
            assert isinstance(self.sae, ReLUSAE)
            assert self.source is not None
            self.close()
            scale_latents_(self.sae, fit_scales(self.sae, self.source, seed=self.config.order_seed))

    def close(self) -> None:
        """Gives the module its fp32 matrices back."""
        if isinstance(self.step, FusedStep):
            self.step.restore_()
