"""An SAE in training: what a batch does to it, what it reports, what outlives the batch."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from sae_kernels import machine
from sae_kernels.errors import DataError
from sae_kernels.formats import native
from sae_kernels.runs.checkpoint import Contents
from sae_kernels.step.objective import k_at
from sae_kernels.step.state import State

if TYPE_CHECKING:
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.base import Progress

Batch = TypeVar("Batch")
STATE_FILE, VALUES_FILE = "state.safetensors", "trainer.json"


class Training(ABC, Generic[Batch]):
    """The base of trainings, whatever they learn from.

    Args:
        progress: the step, or what it leaves for the next one.

    Attributes:
        sae, config: what is trained, and the settings.
        made: steps made.
        tokens: tokens seen.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.sae: SparseAutoencoder = progress.sae
        self.config: TrainConfig = progress.config
        self.made = self.tokens = 0

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
        """Steps skipped because something was not finite; may wait for the device."""

    @abstractmethod
    def set_skipped(self, count: int) -> None:
        """Goes on counting from here."""

    @abstractmethod
    def take(self, batch: Batch) -> None:
        """One step.

        Raises:
            NonFiniteError: something was NaN or infinite, and config says "stop".
        """

    @abstractmethod
    def measured(self) -> dict[str, float]:
        """What the last step reports."""

    def settle(self) -> None:
        """What is left to do once all steps are made."""

    def close(self) -> None:
        """Leaves the SAE as anybody can use it; no step can follow."""

    def line(self, seconds: float) -> dict[str, Any]:
        """The metric line of the last step, after so many seconds of training."""
        k = k_at(self.sae, self.config, self.made - 1)
        return {
            "step": self.made,
            "tokens": self.tokens,
            **self.measured(),
            "dead_fraction": float(self.progress.dead.mask().float().mean()),
            "lr": self.learning_rate(self.made - 1),
            **({} if k is None else {"k": k}),
            "skipped": self.skipped,
            "tokens_per_second": self.tokens / seconds,
        }

    def learning_rate(self, step: int) -> float:
        """That of a step, from 0."""
        return self.config.learning_rate(step, self.sae.config.n_latents)

    def contents(self, **more: Any) -> Contents:
        """Everything that the next step depends on, as a checkpoint holds it.

        The tensors are the living ones: they are to be copied before the next step.
        """
        state = self.progress.state()
        values = {
            "step": self.made,
            "tokens": self.tokens,
            "skipped": self.skipped,
            **state.values,
            **more,
            "versions": _versions(),
        }
        tensors = state.tensors | _random_states(self.sae.W_enc.device)
        return Contents(
            {native.WEIGHTS_FILE: self.progress.weights(), STATE_FILE: tensors},
            {native.CONFIG_FILE: native.config_values(self.sae.config), VALUES_FILE: values},
        )

    def load(self, contents: Contents) -> dict[str, Any]:
        """Takes up a checkpoint of an SAE that has its weights already; what else it says.

        Raises:
            DataError: it is of another run.
        """
        values = dict(contents.values[VALUES_FILE])
        try:
            state = State(dict(contents.tensors[STATE_FILE]), values)
            with torch.no_grad():
                self.progress.load_state(state)
            self.made, self.tokens = int(values["step"]), int(values["tokens"])
            self.set_skipped(int(values["skipped"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{VALUES_FILE}: expected the state of a training, {error!r} is wrong with it; "
                "it is of another version"
            ) from error
        _set_random_states(state.tensors, self.sae.W_enc.device)
        return values


@functools.cache
def _versions() -> dict[str, Any]:
    """Of what the run is made with; asking takes as long as some steps."""
    return dict(machine.versions())


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generators: no step of ours draws from them, what users add may."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
