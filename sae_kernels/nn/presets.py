"""Architectures by the names that people know them by: a kind of SAE and the settings that fit."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Preset:
    """A name for ``--arch``.

    Attributes:
        about: one line for people.
        sae: settings of the SAE that differ from its class's defaults.
        objective, optimizer: the same for the training step.
        data: what it is trained on: a "layer", a layer and another as its "target", or "layers".
    """

    about: str
    sae: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: Literal["layer", "target", "layers"] = "layer"


FREE_NORMS = {"unit_norm_decoder": False}
TRANSCODES = {"subtract_b_dec": False, **FREE_NORMS}
