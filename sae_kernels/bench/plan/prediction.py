"""Predicting the time and memory of a step in each layout.

Every part is a sum of amounts in the units of :data:`devices.UNITS`; its time is their sum over the
rates. That keeps the model linear in the times per unit, which is how calibration finds them.
Formulas: docs/planning.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sae_kernels.bench.work import Amount
from sae_kernels.config.parallel import ParallelConfig

from .devices import USABLE_MEMORY, Device
from .layouts import Layout, Message, Problem, layouts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .calibration import Calibration

_SCORE_BYTES = 8  # of a tile that stays in a GPU's L2 cache: fp32, written and read
# The batch of arXiv 2406.04093, and the default batch of training on each of few devices.
_LARGEST_BATCH, _BATCH_EACH = 131072, 2048


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; nothing is taken to overlap."""

    product: float = 0.0
    selection: float = 0.0
    decode: float = 0.0
    code_gradients: float = 0.0
    latent_order: float = 0.0
    optimizer: float = 0.0
    communication: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all parts together."""
        return math.fsum(asdict(self).values())

    def bounds(self) -> dict[str, float]:
        """Seconds of a step by the resource that limits them."""
        gathers = self.decode + self.code_gradients + self.latent_order
        first = {"product": self.product, "selection": self.selection, "gathers": gathers}
        return first | {n: getattr(self, n) for n in ("optimizer", "communication", "other")}

    @property
    def bound(self) -> str:
        """The resource that limits the step longest."""
        bounds = self.bounds()
        return max(bounds, key=bounds.__getitem__)


@dataclass(frozen=True)
class Prediction:
    """The predicted time and memory of one layout."""

    layout: Layout
    seconds: StepTime  # of a step, by part
    memory: dict[str, float]  # bytes on a GPU, by what they hold
    messages: list[Message]  # that a GPU sends in a step
    fits: bool  # whether the memory is there

    @property
    def memory_bytes(self) -> float:
        """Bytes on a GPU."""
        return sum(self.memory.values())

    @property
    def sent_bytes(self) -> float:
        """Bytes that a GPU sends in a step."""
        return sum(message.bytes for message in self.messages)

    @property
    def bound(self) -> str:
        """The limiting resource, or "memory" if the layout does not fit."""
        return self.seconds.bound if self.fits else "memory"


def default_batch(gpus: int) -> int:
    """The default batch: 2048 tokens per device, at most 131072 (arXiv 2406.04093).

    Example:
        >>> default_batch(1), default_batch(512)
        (2048, 131072)
    """
    return min(_BATCH_EACH * gpus, _LARGEST_BATCH)


def predict(
    problem: Problem, gpus: int, device: Device, calibration: Calibration
) -> list[Prediction]:
    """Predicts every layout of a number of devices, tokens alone first.

    Raises:
        ValueError: several of a device that has no links, or fewer tokens than devices.

    Example:
        >>> from sae_kernels.bench.plan import Problem, calibrated, device
        >>> h200 = device("h200")
        >>> wide = Problem(d_in=8192, n_latents=9 * 2**17, k=64, batch=8192)
        >>> [p.fits for p in predict(wide, 2, h200, calibrated(h200, []))]
        [False, True]
    """
    if gpus > 1 and "network" not in device.rates:
        raise ValueError(f"--gpus: expected 1 with --device {device.name}, got {gpus}")
    if problem.batch < gpus:
        raise ValueError(f"--batch: expected a token a GPU, {gpus}, or more, got {problem.batch}")
    if problem.n_latents < gpus:
        raise ValueError(f"--gpus: expected at most {problem.n_latents} (latents), got {gpus}")
    return [
        Prediction(
            layout=layout,
            seconds=step_time(amounts(problem, layout, device), calibration.rates),
            memory=(memory := layout.memory(problem)),
            messages=layout.messages(problem),
            fits=sum(memory.values()) <= USABLE_MEMORY * device.memory_bytes,
        )
        for layout in layouts(gpus)
    ]


def fastest(predictions: list[Prediction]) -> Prediction | None:
    """The prediction with the shortest step among those that fit; None if none fits."""
    fitting = [p for p in predictions if p.fits]
    return min(fitting, key=lambda p: p.seconds.total) if fitting else None


def unless_told(problem: Problem, gpus: int) -> Layout:
    """The layout that training takes on so many devices if it is told none.

    Example:
        >>> wide, narrow = (Problem(4096, n, k=64, batch=16384) for n in (2**20, 2**12))
        >>> unless_told(wide, 8).name, unless_told(narrow, 8).name
        ('latent-sharded', 'token-sharded')
    """
    sizes = problem.batch, problem.n_latents, problem.decoder_bytes
    chosen = ParallelConfig().fitted(gpus, *sizes)
    return Layout(chosen.latents_over, chosen.tokens_over)


def step_time(amounts: list[Amount], rates: Mapping[str, float]) -> StepTime:
    """The predicted time of amounts of work at given rates.

    Example:
        >>> step_time([Amount("product", "float32", 3e9)], {"float32": 1e12}).product
        0.003
    """
    seconds: dict[str, float] = {}
    for part, unit, amount in amounts:
        seconds[part] = seconds.get(part, 0.0) + amount / rates[unit]
    return StepTime(**seconds)


def amounts(problem: Problem, layout: Layout, device: Device) -> list[Amount]:
    """The amounts of work of one device in a step, by part and unit."""
    work, s = layout.work(problem), problem.element_bytes
    B, D, F = work.B, work.D, work.F
    k = min(problem.k, F)
    # Of scores in random order, the i-th is among the k largest so far with probability k / i.
    candidates = B * k * (1 + math.log(F / k))
    merged = B * k if layout.gpus > 1 else 0
    scores = 0 if device.gpu is None else B * F * _SCORE_BYTES  # a CPU scans them in L1
    updated = min(F, work.used_rows) if problem.config.adam == "lazy" else F
    return [
        Amount("product", "float32" if problem.dtype == "float32" else "bfloat16", work.product),
        Amount("selection", "gathered", scores),
        Amount("selection", "candidates", candidates + merged),
        work.decode(device.traffic),
        work.code_gradients(),
        work.latent_order(device.traffic, s + 4),  # x, and the fp32 residual
        Amount("optimizer", "moved", updated * D * problem.update_bytes),
        Amount("optimizer", "moved", F * D * s),  # b_dec's gradient reads W_enc
        Amount("optimizer", "latents", 2.0 * F),
        *(
            Amount("communication", "node" if m.span <= device.node else "network", m.bytes)
            for m in layout.messages(problem)
        ),
        Amount("other", "moved", B * D * (20 + s)),  # loss, centring, residual: passes over tokens
        Amount("other", "steps", 1.0),
    ]
