"""What a run writes while it trains."""

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
    """Checkpoints and loggers; none of it changes what is learnt."""

    table = "output"

    checkpoint_every: int = setting(
        1000,
        "steps between checkpoints; 0: one only when the run is interrupted",
        NATURAL,
    )
    keep_checkpoints: int = setting(2, "how many checkpoints stay; 0: all", NATURAL)
    loggers: tuple[str, ...] = setting(
        (),
        "where metric lines go besides metrics.jsonl: tensorboard, wandb",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loggers(self.loggers)


def check_loggers(names: Iterable[str]) -> None:
    """Raises ValueError for a logger that there is none of."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"loggers: expected some of {', '.join(LOGGERS)}, got {name!r}; "
                f"{name_hint(name, LOGGERS)}"
            )
