"""What a run costs in each layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .devices import USABLE_MEMORY
from .layouts import Layout, layouts
from .step import StepTime, step_time, work

if TYPE_CHECKING:
    from .calibration import Calibration
    from .devices import Device
    from .layouts import Message
    from .problem import Problem

# The batch of arXiv 2406.04093, and TrainConfig's on each of few devices.
_LARGEST_BATCH, _BATCH_EACH = 131072, 2048


@dataclass(frozen=True)
class Prediction:
    """One layout.

    Attributes:
        layout: which.
        seconds: of a step, by part.
        memory: bytes on a GPU, by what they hold.
        messages: what a GPU sends in a step.
        fits: whether the memory is there.
        gradients: which rows the replicas exchange: "none", "dense" or "touched".
    """

    layout: Layout
    seconds: StepTime
    memory: dict[str, float]
    messages: list[Message]
    fits: bool
    gradients: str

    @property
    def memory_bytes(self) -> float:
        """All of it."""
        return sum(self.memory.values())

    @property
    def sent_bytes(self) -> float:
        """All of it."""
        return sum(message.bytes for message in self.messages)

    @property
    def bound(self) -> str:
        """Which bound rules."""
        return self.seconds.bound if self.fits else "memory"


def default_batch(gpus: int) -> int:
    """2048 tokens a device (TrainConfig's), at most 131072 (arXiv 2406.04093).

    Example:
        >>> default_batch(1), default_batch(512)
        (2048, 131072)
    """
    return min(_BATCH_EACH * gpus, _LARGEST_BATCH)


def predict(
    problem: Problem, gpus: int, device: Device, calibration: Calibration
) -> list[Prediction]:
    """Every layout of so many devices, data-parallel first.

    Raises:
        ValueError: several of a device that has no links, or fewer tokens than devices.

    Example:
        >>> from sae_kernels.bench.plan import Problem, calibrated, device
        >>> h200 = device("h200")
        >>> wide = Problem(d_in=8192, n_latents=2**20, k=64, batch=8192)
        >>> [p.fits for p in predict(wide, 2, h200, calibrated(h200, []))]
        [False, True]
    """
    if gpus > 1 and "network" not in device.rates:
        raise ValueError(f"--gpus: expected 1 with --device {device.name}, got {gpus}")
    if problem.batch < gpus:
        raise ValueError(f"--batch: expected a token a GPU, {gpus}, or more, got {problem.batch}")
    if problem.n_latents < gpus:
        raise ValueError(f"--gpus: expected at most {problem.n_latents} (latents), got {gpus}")
    return [_predicted(problem, layout, device, calibration) for layout in layouts(gpus)]


def fastest(predictions: list[Prediction]) -> Prediction | None:
    """The one with the shortest step among those that fit, if any does."""
    fitting = [p for p in predictions if p.fits]
    return min(fitting, key=lambda p: p.seconds.total) if fitting else None


def _predicted(
    problem: Problem, layout: Layout, device: Device, calibration: Calibration
) -> Prediction:
    memory = layout.memory(problem)
    return Prediction(
        layout=layout,
        seconds=step_time(work(problem, layout, device), calibration.rates),
        memory=memory,
        messages=layout.messages(problem),
        fits=sum(memory.values()) <= USABLE_MEMORY * device.memory_bytes,
        gradients=layout.gradient_rows(problem)[0],
    )
