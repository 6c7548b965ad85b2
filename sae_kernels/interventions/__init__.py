"""Edits of codes and directions, on tensors and inside running models; reading codes there."""

from sae_kernels.interventions.attribution import (
    Attribution,
    Effects,
    Node,
    rank_correlation,
    strongest,
)
from sae_kernels.interventions.bank import EditBank
from sae_kernels.interventions.changes import edit_codes
from sae_kernels.interventions.circuits import (
    Circuit,
    Curves,
    Edge,
    circuit_curves,
    draw_circuit,
    find_circuit,
)
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
from sae_kernels.interventions.shift import (
    Documents,
    Probe,
    fit_probe,
    mean_documents,
    separation,
)
from sae_kernels.interventions.watching import Watch, watch

__all__ = [
    "Attribution",
    "Circuit",
    "Curves",
    "DirectEffects",
    "Documents",
    "Edge",
    "Edit",
    "EditBank",
    "Effects",
    "LatentCosines",
    "LatentEffects",
    "Node",
    "Probe",
    "Watch",
    "ablate",
    "add",
    "circuit_curves",
    "clamp",
    "closest_latents",
    "contrast",
    "draw_circuit",
    "edit_codes",
    "find_circuit",
    "fit_probe",
    "intervene",
    "keep_only",
    "latent_effects",
    "load_directions",
    "mean_codes",
    "mean_documents",
    "rank_correlation",
    "resample",
    "save_directions",
    "scale",
    "separation",
    "set_to",
    "steer",
    "strongest",
    "watch",
]
