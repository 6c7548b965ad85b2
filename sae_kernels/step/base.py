"""State that all training steps share: dead-latent counters, schedule, the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.nn.objective import Context
from sae_kernels.step.compute import compute_dtype
from sae_kernels.step.counters import DeadLatents, SparsitySchedule
from sae_kernels.step.state import State, restore_

if TYPE_CHECKING:
    from sae_kernels.config.objective import ObjectiveConfig
    from sae_kernels.nn import SparseAutoencoder


class StepResult(NamedTuple):
    """What a step reports; on the device, read when somebody looks. All but the last are scalars.

    Attributes:
        loss: the whole loss.
        fvu: squared error over the batch's variance.
        l0: latents per token that fired.
        aux_loss: AuxK's part of the loss.
        skipped: whether the loss or the gradient norm was not finite and nothing was changed.
        fired: int32 [F], how often each latent fired.
    """

    loss: torch.Tensor
    fvu: torch.Tensor
    l0: torch.Tensor
    aux_loss: torch.Tensor
    skipped: torch.Tensor
    fired: torch.Tensor


class TrainingStep(Protocol):
    """What a trainer asks of a step; whatever has this can be trained.

    Attributes:
        sae: what is trained, with a ``config``, ``W_enc`` (for its device) and ``save_pretrained``.
        dead: the dead-latent counters, or whatever else has ``mask()``.
    """

    sae: SparseAutoencoder
    dead: DeadLatents

    def __call__(
        self,
        x: torch.Tensor,
        *,
        lr: float,
        k: float | None = None,
        target: torch.Tensor | None = None,
    ) -> StepResult:
        """One step on raw activations [B, input width] with this learning rate and k."""

    def state(self) -> State:
        """Everything but the weights that the next step depends on."""

    def load_state(self, state: State) -> None:
        """Takes up what :meth:`state` gave; the SAE has its weights already."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE's state dict, its master weights in fp32 wherever they lie."""

    def restore_(self) -> None:
        """Leaves the SAE as anybody can use it; no step can follow."""


class StepBase:
    """The base of this package's steps.

    Args:
        sae: the module, trained in place.
        objective: what is minimised, of the architecture's own class; None: that class's defaults.
        optimizer: Adam's settings and precisions.
        steps: of the whole run, over which the sparsity schedule unfolds.
        seed: of prefixes that are drawn for each step.

    Attributes:
        sae, objective, optimizer: as given.
        dtype: of the kernels' operands.
        dead: the dead-latent counters.
        schedule: the sparsity penalty's coefficient.
        k_aux: dead latents per token in AuxK.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        objective: ObjectiveConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        *,
        steps: int = 1000,
        seed: int = 0,
    ) -> None:
        objective = sae.objective_class() if objective is None else objective
        sae.check_objective(objective)
        self.sae, self.objective, self.seed = sae, objective, seed
        self._reads, self._writes = sae.config.input_width, sae.config.output_width
        self._transcodes = sae.config.transcodes
        self.optimizer = OptimizerConfig() if optimizer is None else optimizer
        device = sae.W_enc.device
        self.dtype = compute_dtype(self.optimizer.compute, device)
        self._dtype_before, sae.compute_dtype = sae.compute_dtype, self.dtype
        self.dead = DeadLatents(sae.config.n_latents, objective.dead_after_tokens, device)
        self.schedule = SparsitySchedule(objective, steps)
        self.k_aux = objective.k_aux or max(1, sae.config.input_width // 2)

    def checked(
        self, x: torch.Tensor, target: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens and their targets in fp32 and in the scale of training.

        Raises:
            ValueError: not [B, input width] and [B, output width] with at least one token; a target
                where the input is its own, or none where it is not.
        """
        config = self.sae.config
        if x.dim() != 2 or x.shape[1] != self._reads or x.shape[0] == 0:
            raise ValueError(
                f"x: expected shape [B, {self._reads}] with B > 0 (tokens by "
                f"{_widths('d_in', config.d_in, config.n_layers)}), got {list(x.shape)}"
            )
        x = _scaled(x.float(), config.activation_scale)
        if not self._transcodes:
            if target is not None:
                raise ValueError("target: expected none, the SAE reconstructs its input; got one")
            return x, x
        if target is None:
            raise ValueError("target: expected what the transcoder is to reconstruct, got None")
        if target.shape != (x.shape[0], self._writes):
            raise ValueError(
                f"target: expected shape [{x.shape[0]}, {self._writes}] (a row per token), got "
                f"{list(target.shape)}"
            )
        return x, _scaled(target.float(), config.target_scale)

    def context(
        self,
        x_centred: torch.Tensor,
        target: torch.Tensor,
        scale: torch.Tensor,
        k: float | None = None,
        *,
        skip_input: torch.Tensor | None = None,
        leaves: dict[str, torch.Tensor] | None = None,
    ) -> Context:
        """A batch as the objective sees it at this step; see :class:`Context` for the arguments."""
        sae, schedule = self.sae, self.schedule
        return Context(
            sae=sae,
            objective=self.objective,
            x=x_centred,
            target=target,
            scale=scale,
            k=getattr(sae.config, "k", 0) if k is None else k,
            coefficient=schedule.coefficient(),
            p=schedule.p,
            observe=schedule.observe,
            dead_mask=self.dead.mask,
            prefixes=sae.prefixes(self.objective, schedule.step, self.seed),
            skip_input=skip_input,
            leaves=leaves,
        )

    def advance(
        self,
        fired: torch.Tensor,
        n_tokens: int,
        finite: torch.Tensor,
        l0: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Takes in a step, and gives its L0; one that was not finite only moves the schedule on."""
        self.sae.is_fresh = False
        l0 = fired.sum() / n_tokens if l0 is None else l0
        self.dead.update(fired, n_tokens, ~finite)
        self.schedule.advance(l0)
        self.sae.after_step_(finite)
        return l0

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

    def restore_(self) -> None:
        """Gives the SAE its own compute dtype back; no step can follow."""
        self.sae.compute_dtype = self._dtype_before


def _widths(name: str, width: int, n_layers: int) -> str:
    return name if n_layers == 1 else f"{n_layers} layers of {name} = {width}"


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else x * scale


def loss_scale(
    x: torch.Tensor, loss: str, scratch: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What multiplies the squared error, and the batch's total variance about its mean.

    Sums go by token first, so that they do not depend on the number of threads.
    """
    deviation = torch.sub(x, x.mean(0), out=scratch)
    variance = deviation.square_().sum(1).sum()
    return (1 / variance if loss == "fvu" else torch.ones_like(variance) / x.shape[0]), variance
