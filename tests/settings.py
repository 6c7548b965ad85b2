"""Settings for tests: every one that is not said is neutral, whatever the architecture."""

from __future__ import annotations

import dataclasses
from typing import Any

from sae_kernels.config import ObjectiveConfig, SAEConfig, TrainConfig
from sae_kernels.nn import SparseAutoencoder, architecture

# Without a penalty, and with AuxK: not what an architecture recommends.
NEUTRAL: dict[str, Any] = {
    "loss": "fvu",
    "sparsity": "none",
    "sparsity_coefficient": 0.0,
    "target_l0": None,
    "auxk_alpha": 1 / 32,
    "balance_coefficient": 0.0,
}


def settings(
    sae: SAEConfig | SparseAutoencoder | type[SAEConfig] | type[SparseAutoencoder], **flat: Any
) -> TrainConfig:
    """Settings by name, of objective, optimizer and run alike, for an SAE's architecture."""
    config = getattr(sae, "config_class", sae)
    objective: type[ObjectiveConfig] = architecture(config.architecture).objective_class
    known = {field.name for field in dataclasses.fields(objective)}
    neutral = {name: value for name, value in NEUTRAL.items() if name in known}
    return TrainConfig.of(objective, **{**neutral, **flat})
