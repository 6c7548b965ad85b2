"""The registry of benchmark cases and their presets."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Shape(NamedTuple):
    """The sizes of a case: B tokens, D d_in, F n_latents and K kept per token."""

    B: int
    D: int
    F: int
    K: int


SMALL = ((256, 64, 512, 8), (256, 128, 2048, 16), (512, 256, 4096, 32), (1024, 384, 8192, 32))
CPU_SMALL = Shape(2048, 768, 24576, 32)
GPU_YARDSTICKS = {
    "gpu-small": Shape(8192, 768, 65536, 32),
    "gpu-mid": Shape(8192, 2304, 131072, 64),
    "gpu-wide": Shape(4096, 2688, 1048576, 32),
}
# The modes of an operation, in the order in which they build on each other.
MODES = {
    "encode": ("inference",),
    "decode": ("inference",),
    "sae": ("inference", "forward", "backward"),
    "step": ("step",),
}
ARCHITECTURES = ("topk", "batch_topk", "jumprelu", "relu")
POPULARITIES = ("uniform", "zipf", "real")


@dataclasses.dataclass(frozen=True)
class Case:
    """A benchmark case: an operation in a mode at a shape.

    Attributes:
        operation: "encode", "decode" (codes of k latents), "sae" (both) or "step".
        mode: one of the operation's :data:`MODES`; "backward" has the forward pass in it.
        shape: B, D, F, K.
        popularity: how often latents are chosen: "uniform", "zipf" or "real" (stored activations).
        architecture: how they are selected.
    """

    operation: str
    mode: str
    shape: Shape
    popularity: str = "zipf"
    architecture: str = "topk"

    @property
    def name(self) -> str:
        """The unique name of the case, which ``--only`` matches.

        Example:
            >>> Case("step", "step", Shape(2048, 768, 24576, 32)).name
            'step-topk-2048x768x24576x32-zipf'
        """
        mode = f"-{self.mode}" * (len(MODES[self.operation]) > 1)
        size = "x".join(map(str, self.shape))
        return f"{self.operation}{mode}-{self.architecture}-{size}-{self.popularity}"

    def facts(self) -> dict[str, str | int]:
        """The fields of a record that describe the case."""
        return {
            "case": self.name,
            "operation": self.operation,
            "mode": self.mode,
            "architecture": self.architecture,
            **self.shape._asdict(),
            "popularity": self.popularity,
        }


def step(shape: Shape, popularity: str = "zipf", architecture: str = "topk") -> Case:
    """The case of a training step."""
    return Case("step", "step", shape, popularity, architecture)


def real(case: Case, d_in: int) -> Case:
    """Training-step cases on stored activations of this width."""
    return dataclasses.replace(case, shape=case.shape._replace(D=d_in), popularity="real")


def operators(shape: Shape, popularity: str = "zipf") -> list[Case]:
    """Cases of all operations and modes except the training step."""
    return [
        Case(operation, mode, shape, popularity)
        for operation, modes in MODES.items()
        for mode in modes
        if operation != "step"
    ]


_TINY = Shape(256, 64, 512, 8)


# Widths in circulation (16k to 1M), as far as a machine of the kind takes them.
PRESETS: dict[str, list[Case]] = {
    "tiny": [step(_TINY, "uniform"), *operators(_TINY, "uniform")],
    "cpu-small": [step(CPU_SMALL)],
    "cpu-operators": operators(CPU_SMALL),
    "cpu-architectures": [step(CPU_SMALL, architecture=name) for name in ARCHITECTURES],
    "cpu-popularity": [step(CPU_SMALL, popularity) for popularity in ("uniform", "zipf")],
    "cpu-sweep": [
        *(step(CPU_SMALL._replace(F=F)) for F in (2048, 8192, 24576, 65536)),
        *(step(CPU_SMALL._replace(B=B)) for B in (256, 1024, 4096)),
        *(step(CPU_SMALL._replace(K=K)) for K in (8, 128, 512)),
    ],
    "crossover": [step(Shape(*sizes), "uniform") for sizes in (*SMALL, CPU_SMALL)],
    **{
        name: [step(shape, "uniform"), *operators(shape, "uniform")]
        for name, shape in GPU_YARDSTICKS.items()
    },
}


def chosen(presets: Iterable[str], only: str | None = None) -> list[Case]:
    """The cases of presets, without duplicates, whose names match a regular expression.

    Raises:
        ValueError: an unknown preset, no regular expression, or none that is left.
    """
    found: dict[str, Case] = {}
    for preset in presets:
        if preset not in PRESETS:
            raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        found |= {case.name: case for case in PRESETS[preset]}
    try:
        kept = [case for name, case in found.items() if re.search(only or "", name)]
    except re.error as error:
        raise ValueError(f"--only: expected a regular expression, got {only!r} ({error})") from None
    if not kept:
        raise ValueError(
            f"--only: expected a part of the name of a case such as {next(iter(found))}, got "
            f"{only!r}; see sae-kernels bench --list"
        )
    return kept
