"""Edits of codes and directions, on tensors and inside running models; reading codes there."""

from sae_kernels.interventions.bank import EditBank
from sae_kernels.interventions.changes import edit_codes
from sae_kernels.interventions.edits import (
    Edit,
    ablate,
    add,
    clamp,
    keep_only,
    mean_codes,
    resample,
    scale,
    set_to,
    steer,
)
from sae_kernels.interventions.running import intervene
from sae_kernels.interventions.watch import Watch, watch

__all__ = [
    "Edit",
    "EditBank",
    "Watch",
    "ablate",
    "add",
    "clamp",
    "edit_codes",
    "intervene",
    "keep_only",
    "mean_codes",
    "resample",
    "scale",
    "set_to",
    "steer",
    "watch",
]
