"""The work of one step on one device, by part, and the time it takes at given rates.

Every part is a sum of amounts in the units of :data:`devices.UNITS`; its time is their sum over the
rates. That keeps the model linear in the times per unit, which is how calibration finds them.
Formulas: docs/planning.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .devices import Device
    from .layouts import Layout
    from .problem import Problem

_SCORE_BYTES = 8  # of a tile that stays in a GPU's L2 cache: fp32, written and read
_CACHE_SHARE = 0.75  # of a cache that a table may fill and still be found there


class Amount(NamedTuple):
    """So much work of one unit, for one part of the step."""

    part: str
    unit: str
    amount: float


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
        """Of all parts."""
        return math.fsum(asdict(self).values())

    def bounds(self) -> dict[str, float]:
        """Seconds by what limits them."""
        return {
            "product": self.product,
            "selection": self.selection,
            "gathers": self.decode + self.code_gradients + self.latent_order,
            "optimizer": self.optimizer,
            "communication": self.communication,
            "other": self.other,
        }

    @property
    def bound(self) -> str:
        """The one that takes longest."""
        bounds = self.bounds()
        return max(bounds, key=bounds.__getitem__)


def work(problem: Problem, layout: Layout, device: Device) -> list[Amount]:
    """What one device does in a step."""
    return [
        *_encoder(problem, layout, device),
        *_gathers(problem, layout, device),
        *_optimizer(problem, layout),
        *(
            Amount("communication", "node" if m.span <= device.node else "network", m.bytes)
            for m in layout.messages(problem)
        ),
        # Loss, centring and the residual: passes over tokens.
        Amount(
            "other",
            "moved",
            layout.tokens(problem) * problem.d_in * (20 + problem.element_bytes),
        ),
        Amount("other", "steps", 1.0),
    ]


def step_time(amounts: list[Amount], rates: Mapping[str, float]) -> StepTime:
    """The time of that work.

    Example:
        >>> step_time([Amount("product", "float32", 3e9)], {"float32": 1e12}).product
        0.003
    """
    seconds: dict[str, float] = {}
    for part, unit, amount in amounts:
        seconds[part] = seconds.get(part, 0.0) + amount / rates[unit]
    return StepTime(**seconds)


def _encoder(problem: Problem, layout: Layout, device: Device) -> list[Amount]:
    b, f = layout.tokens(problem), layout.latents(problem)
    k = min(problem.k, f)
    unit = "float32" if problem.dtype == "float32" else "bfloat16"
    # Of scores in random order, the i-th is among the k largest so far with probability k / i.
    candidates = b * k * (1 + math.log(f / k))
    scores = 0 if device.gpu is None else b * f * _SCORE_BYTES  # a CPU scans them in L1
    merged = b * k if layout.shards > 1 else 0
    return [
        Amount("product", unit, 2.0 * b * problem.d_in * f),
        Amount("selection", "gathered", scores),
        Amount("selection", "candidates", candidates + merged),
    ]


def _gathers(problem: Problem, layout: Layout, device: Device) -> list[Amount]:
    """Rows of W_dec twice per entry, of x and of the residual once."""
    D, b, uses = problem.d_in, layout.tokens(problem), layout.kept(problem)
    row = D * problem.decoder_bytes
    sources = D * (problem.element_bytes + 4)
    return [
        _decode(device, layout.latents(problem), layout.touched(problem), uses, row),
        Amount("code_gradients", "gathered", uses * row),
        Amount("latent_order", _unit(device, b * sources), uses * sources),
    ]


def _decode(device: Device, rows: float, touched: float, uses: float, row: int) -> Amount:
    """Every row that is used leaves memory once, every use is gathered: the slower of the two."""
    if _unit(device, rows * row) == "moved":
        from_memory = touched * row / device.rates["moved"]
        if from_memory > uses * row / device.rates["gathered"]:
            return Amount("decode", "moved", touched * row)
    return Amount("decode", "gathered", uses * row)


def _unit(device: Device, table_bytes: float) -> str:
    return "gathered" if table_bytes <= _CACHE_SHARE * device.cache_bytes else "moved"


def _optimizer(problem: Problem, layout: Layout) -> list[Amount]:
    D, f = problem.d_in, layout.latents(problem)
    touched = min(f, layout.replicas * layout.touched(problem))
    updated = touched if problem.config.adam == "lazy" else f
    # Gradients that are exchanged are written and read in fp32; others never leave the cache.
    exchanged = layout.gradient_rows_held(problem)
    return [
        Amount("optimizer", "moved", updated * D * problem.update_bytes),
        Amount("optimizer", "moved", exchanged * 2 * D * 8),
        Amount("optimizer", "moved", f * D * problem.element_bytes),  # b_dec's gradient reads W_enc
        Amount("optimizer", "latents", 2.0 * f),
    ]
