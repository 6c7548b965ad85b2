"""What a training step leaves for the next one, whatever its route."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.nn import BatchTopKSAE
from sae_kernels.step.auxk import latents_per_token
from sae_kernels.step.dead import DeadLatents
from sae_kernels.step.objective import check_objective, fixed_prefixes, random_prefixes
from sae_kernels.step.sparsity import SparsitySchedule
from sae_kernels.step.state import State, restore_

if TYPE_CHECKING:
    import torch

    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.objective import Prefixes


class Progress:
    """The base of all steps: counters, schedule and what else outlives a batch.

    Attributes:
        sae, config: what is trained, and the settings.
        dead: the dead-latent counters.
        schedule: the penalty's coefficient.
        k_aux: dead latents per token in AuxK.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig) -> None:
        check_objective(sae, config)
        self.sae, self.config = sae, config
        device = sae.W_enc.device
        self.dead = DeadLatents(sae.config.n_latents, config.dead_after_tokens, device)
        self.schedule = SparsitySchedule(config)
        self.k_aux = latents_per_token(sae, config)
        self._prefixes = fixed_prefixes(sae, config)

    def prefixes(self) -> Prefixes | None:
        """A Matryoshka SAE's prefixes at this step."""
        return self._prefixes or random_prefixes(self.sae, self.config, self.schedule.step)

    def _living(self) -> dict[str, torch.Tensor]:
        """Tensors that every step changes in place; the SAE's state dict apart."""
        saved = self.sae.state_dict().keys()
        buffers = {f"sae.{n}": b for n, b in self.sae.named_buffers() if n not in saved}
        return {"dead.since_fired": self.dead.since_fired, **buffers}

    def state(self) -> State:
        """Everything but the weights that the next step depends on."""
        return State(self._living(), {}) | self.schedule.state()

    def load_state(self, state: State) -> None:
        """Takes up what :meth:`state` gave; the SAE has its weights already.

        Raises:
            DataError: the state is of another SAE or configuration.
        """
        restore_(self._living(), state)
        device = self.dead.since_fired.device
        mine = {n: t.to(device) for n, t in state.tensors.items() if n.startswith("schedule.")}
        self.schedule.load_state(state._replace(tensors=mine))

    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE's state dict, its master weights in fp32 wherever they lie."""
        return dict(self.sae.state_dict())

    def advance(
        self, fired: torch.Tensor, n_tokens: int, l0: torch.Tensor, finite: torch.Tensor
    ) -> None:
        """Takes in a step; one that was not finite changed nothing but the schedule's place."""
        self.dead.update(fired, n_tokens, ~finite)
        self.schedule.advance(l0)
        if isinstance(self.sae, BatchTopKSAE):
            self.sae.follow_threshold_(finite)
