"""Edits of codes and directions, on tensors and inside running models; reading codes there."""

from sae_kernels.interventions.bank import EditBank
from sae_kernels.interventions.changes import edit_codes
from sae_kernels.interventions.contrast import (
    LatentCosines,
    closest_latents,
    contrast,
    load_directions,
    save_directions,
)
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
from sae_kernels.interventions.effects import DirectEffects, LatentEffects, latent_effects
from sae_kernels.interventions.running import intervene
from sae_kernels.interventions.watching import Watch, watch

__all__ = [
    "DirectEffects",
    "Edit",
    "EditBank",
    "LatentCosines",
    "LatentEffects",
    "Watch",
    "ablate",
    "add",
    "clamp",
    "closest_latents",
    "contrast",
    "edit_codes",
    "intervene",
    "keep_only",
    "latent_effects",
    "load_directions",
    "mean_codes",
    "resample",
    "save_directions",
    "scale",
    "set_to",
    "steer",
    "watch",
]
