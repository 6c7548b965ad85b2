"""Settings of a run's output: checkpoints, loggers and names in the SAE's metadata."""

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
    """Settings of a run's output: checkpoints, loggers, names in the SAE's metadata.

    None of them changes the training.
    """

    table = "output"

    checkpoint_every: int = setting(
        1000, "steps between checkpoints; 0 saves one only when the run is interrupted", NATURAL
    )
    keep_checkpoints: int = setting(2, "number of checkpoints that are kept; 0 keeps all", NATURAL)
    loggers: tuple[str, ...] = setting(
        (), "further loggers of the metric lines, besides metrics.jsonl: tensorboard, wandb"
    )
    model_name: str | None = setting(
        None,
        "name of the model for the SAE's metadata, which other tools read; the default is what the "
        "activations say",
    )
    hook_name: str | None = setting(
        None,
        "TransformerLens' name of the layer for the SAE's metadata, as blocks.6.hook_resid_post; "
        "the default is known for the output of a decoder's block",
    )
    hook_name_out: str | None = setting(
        None, "the same of a transcoder's target, as blocks.6.hook_mlp_out"
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
