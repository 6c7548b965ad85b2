"""An SAE in training: one step per batch, metric lines and the state of checkpoints."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from sae_kernels import machine
from sae_kernels.data.sample import sample_rows
from sae_kernels.errors import DataError, NonFiniteError
from sae_kernels.nn import pretrained
from sae_kernels.runs.checkpoint import Contents
from sae_kernels.step.state import State
from sae_kernels.training.fresh import split
from sae_kernels.training.graphed_step import GraphedStep, eager_reason
from sae_kernels.training.resample import check_resampling, resample_dead_

if TYPE_CHECKING:
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.data.rows import RowSource
    from sae_kernels.data.shared import Share
    from sae_kernels.step import StepResult, TrainingStep

Batch = TypeVar("Batch")
STATE_FILE, VALUES_FILE = "state.safetensors", "trainer.json"


class Trainable(ABC, Generic[Batch]):
    """Base class of an SAE in training, on batches of any kind.

    Args:
        step: the training step, with its state.
        config: the settings.

    Attributes:
        training_step, config: as given.
        sae: the step's SAE.
        made: steps made.
        tokens: tokens seen.
    """

    def __init__(self, step: TrainingStep, config: TrainConfig) -> None:
        self.training_step, self.sae, self.config = step, step.sae, config
        self.made = self.tokens = 0
        if config.k_start is not None and self.k(0) is None:
            name = self.sae.config.architecture
            raise ValueError(f"k_start: expected none with architecture {name!r}, which has no k")

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.made >= self.config.steps

    @property
    def due(self) -> bool:
        """Whether the step just made has a metric line."""
        return self.made % self.config.log_every == 0 or self.finished

    @property
    @abstractmethod
    def skipped(self) -> int:
        """Number of skipped steps; may wait for the device."""

    @abstractmethod
    def set_skipped(self, count: int) -> None:
        """Sets the number of skipped steps, from a checkpoint."""

    @abstractmethod
    def step(self, batch: Batch) -> None:
        """Makes one step.

        Raises:
            NonFiniteError: loss or gradients were not finite, and ``on_nonfinite`` is "stop".
        """

    @abstractmethod
    def measured(self) -> dict[str, float]:
        """Metrics of the last step, by name."""

    def finalize(self) -> None:
        """Fits what is fitted after the last step."""

    def close(self) -> None:
        """Leaves the SAE ready for use outside training; no step can follow."""
        self.training_step.restore_()

    def line(self, seconds: float) -> dict[str, Any]:
        """The metric line of the last step, given the seconds of training so far."""
        k = self.k(self.made - 1)
        return {
            "step": self.made,
            "tokens": self.tokens,
            **self.measured(),
            "dead_fraction": self.dead_fraction,
            "lr": self.learning_rate(self.made - 1),
            **({} if k is None else {"k": k}),
            "skipped": self.skipped,
            "tokens_per_second": self.tokens / seconds,
            **({"cuda_graph": self.eager_reason is None} if self._on_gpu else {}),
        }

    @property
    def dead_fraction(self) -> float:
        """The fraction of all latents that are dead; of latents over ranks all must ask."""
        dead = self.training_step.dead.mask().float()
        ranks = getattr(self.training_step, "ranks", None)
        if ranks is None:
            return float(dead.mean())
        return float(ranks.total(dead.sum()) / self.sae.config.n_latents)

    @property
    def launching(self) -> dict[str, str]:
        """On a GPU: whether the last step was a CUDA graph's, or why not."""
        if not self._on_gpu:
            return {}
        reason = self.eager_reason
        return {"cuda_graph": "replayed" if reason is None else f"no: {reason}"}

    @property
    def _on_gpu(self) -> bool:
        return self.sae.W_enc.device.type == "cuda"

    @property
    def eager_reason(self) -> str | None:
        """Why the last step was launched kernel by kernel; None: it was a CUDA graph's."""
        step = self.training_step
        if isinstance(step, GraphedStep):
            return step.reason
        return eager_reason(step) or "cuda_graph is false"

    def learning_rate(self, step: int) -> float:
        """Learning rate at a 0-based step."""
        return self.config.learning_rate(step, self.sae.config.n_latents)

    def k(self, step: int) -> float | None:
        """The k at a 0-based step; None if the architecture has none."""
        own: float | None = getattr(self.sae.config, "k", None)
        return None if own is None else self.config.k_at(step, own)

    def contents(self, **more: Any) -> Contents:
        """Contents of a checkpoint: all that the next step depends on.

        Tensors are not copied; that must happen before the next step.
        """
        state = self.training_step.state()
        values = {
            "step": self.made,
            "tokens": self.tokens,
            "skipped": self.skipped,
            **state.values,
            **more,
            "versions": _versions(),
        }
        tensors = state.tensors | _random_states(self.sae.W_enc.device)
        described = pretrained.config_values(self.sae.config, self.sae.metadata)
        return Contents(
            {pretrained.WEIGHTS_FILE: self.training_step.weights(), STATE_FILE: tensors},
            {pretrained.CONFIG_FILE: described, VALUES_FILE: values},
        )

    def load(self, contents: Contents) -> dict[str, Any]:
        """Restores a checkpoint, without the SAE's weights, and returns its plain values.

        Raises:
            DataError: the checkpoint of another run.
        """
        values = dict(contents.values[VALUES_FILE])
        try:
            state = State(dict(contents.tensors[STATE_FILE]), values)
            with torch.no_grad():
                self.training_step.load_state(state)
            self.made, self.tokens = int(values["step"]), int(values["tokens"])
            self.set_skipped(int(values["skipped"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{VALUES_FILE}: expected the state of a training, {error!r} is wrong with it; "
                "it is of another version"
            ) from error
        _set_random_states(state.tensors, self.sae.W_enc.device)
        return values


class ActivationTraining(Trainable[torch.Tensor]):
    """Trains an SAE in place on rows of activations.

    Args:
        step: FusedStep, AutogradStep or another :class:`~sae_kernels.step.TrainingStep`.
        config: the settings.
        source: all rows, for what is fitted after the last step; None for a stream.
        share: its columns, if the batches are of several runs' layers.
    """

    def __init__(
        self,
        step: TrainingStep,
        config: TrainConfig,
        source: RowSource | None,
        share: Share | None = None,
    ) -> None:
        super().__init__(step, config)
        if config.resample_every is not None:
            check_resampling(step)
        self._to_finish = self.sae.rows_to_finish(config.objective)
        if self._to_finish and source is None:
            raise ValueError(
                "fix_shrinkage: expected false on a stream (it fits stored activations), got true"
            )
        self.source, self._share = source, share
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.sae.W_enc.device)
        self._last: StepResult | None = None

    @property
    def skipped(self) -> int:
        """Number of skipped steps; waits for the device."""
        return int(self._skipped)

    def set_skipped(self, count: int) -> None:
        """Sets the number of skipped steps, from a checkpoint."""
        self._skipped.fill_(count)

    def step(self, batch: torch.Tensor) -> None:
        """One step on raw rows; for a transcoder inputs and targets side by side."""
        device = self.sae.W_enc.device
        own = batch if self._share is None else self._share.rows(batch)
        x, target = split(own.to(device), self.sae.config)
        lr, k = self.learning_rate(self.made), self.k(self.made)
        size = self.config.micro_batch_size
        if size is None:
            self._last = self.training_step(x, lr=lr, k=k, target=target)
        else:
            targets = None if target is None else target.split(size)
            self._last = self.training_step(x.split(size), lr=lr, k=k, target=targets)
        self._skipped += self._last.skipped
        self.made += 1
        self.tokens += len(batch)
        # On a GPU every look would make the host wait.
        looks = self.config.on_nonfinite == "stop" and (self.due or device.type == "cpu")
        if looks and self._skipped:
            raise NonFiniteError.in_step(self.made - 1)
        if self.config.resamples(self.made):
            resample_dead_(self.training_step, x, target)

    def contents(self, **more: Any) -> Contents:
        """Contents of a checkpoint, from which the run can go on alone too."""
        if self._share is not None:
            more["batches"] = self._share.own_state(more["batches"])
        return super().contents(**more)

    def load(self, contents: Contents) -> dict[str, Any]:
        """Restores a checkpoint of this run, made alone or together with others."""
        values = super().load(contents)
        if self._share is not None:
            values["batches"] = self._share.shared_state(values["batches"])
        return values

    def measured(self) -> dict[str, float]:
        """Loss, FVU, L0, AuxK loss and the architecture's own figures of the last step."""
        assert self._last is not None
        values = self._last._asdict()
        found = {name: float(values[name]) for name in ("loss", "fvu", "l0", "aux_loss")}
        return {**found, **self.sae.step_figures(self._last.fired)}

    def finalize(self) -> None:
        """Lets the architecture fit what it fits after training, on a random sample of rows."""
        if not self._to_finish:
            return
        assert self.source is not None
        self.close()
        x = sample_rows(self.source, self._to_finish, self.config.order_seed)
        x = x.to(self.sae.W_enc.device).float() * self.sae.config.activation_scale
        with torch.no_grad():
            self.sae.finish_training_(x, self.config.objective)


@functools.cache
def _versions() -> dict[str, Any]:
    """Versions of the packages in use, cached as looking them up takes as long as some steps."""
    return dict(machine.versions())


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's generators, which a user's own step may draw from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
