"""How a run is saved and watched."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sae_kernels.errors import name_hint

if TYPE_CHECKING:
    from collections.abc import Iterable

LOGGERS = ("tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What a run writes while it trains; none of it changes what is learnt.

    Attributes:
        checkpoint_every: steps between checkpoints; 0: one only when the run is interrupted.
        keep_checkpoints: how many stay; 0: all.
        loggers: where metric lines go besides metrics.jsonl: "tensorboard", "wandb".
    """

    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    loggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}: expected an integer of at least 0, got {value!r}")
        given = (self.loggers,) if isinstance(self.loggers, str) else self.loggers
        if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"loggers: expected a list of names, got {self.loggers!r}")
        check_loggers(given)
        object.__setattr__(self, "loggers", tuple(given))


def check_loggers(names: Iterable[str]) -> None:
    """Raises ValueError for a logger that there is none of."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"loggers: expected some of {', '.join(LOGGERS)}, got {name!r}; "
                f"{name_hint(name, LOGGERS)}"
            )
