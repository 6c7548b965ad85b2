"""Settings of a run's output: checkpoints and loggers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sae_kernels.config.base import NATURAL, Settings, setting
from sae_kernels.errors import name_hint

if TYPE_CHECKING:
    from collections.abc import Iterable

LOGGERS = ("tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class OutputConfig(Settings):
    """Settings of checkpoints and loggers; none of them changes the training."""

    table = "output"

    checkpoint_every: int = setting(
        1000, "steps between checkpoints; 0 saves one only when the run is interrupted", NATURAL
    )
    keep_checkpoints: int = setting(2, "number of checkpoints that are kept; 0 keeps all", NATURAL)
    loggers: tuple[str, ...] = setting(
        (), "further loggers of the metric lines, besides metrics.jsonl: tensorboard, wandb"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loggers(self.loggers)


def check_loggers(names: Iterable[str]) -> None:
    """Raises ValueError for an unknown logger."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"loggers: expected some of {', '.join(LOGGERS)}, got {name!r}; "
                f"{name_hint(name, LOGGERS)}"
            )
