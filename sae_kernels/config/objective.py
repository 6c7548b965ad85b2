"""Settings of the training objective that all architectures share."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sae_kernels.config.base import (
    FRACTION,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INTEGER,
    Settings,
    setting,
)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Settings):
    """Loss, sparsity penalty and AuxK; an architecture's own class adds settings to these.

    Penalties are per token and are described in docs/architectures.md.
    """

    table = "objective"

    loss: Literal["fvu", "mse"] = setting(
        "fvu",
        "reconstruction loss: fvu, squared error over the batch's variance (sparsify), or mse, "
        "squared error per token (dictionary_learning, SAELens)",
    )
    sparsity: str = setting(
        "none",
        "sparsity penalty per token: none; l1, the sum of the codes; lp, the sum of their p-th "
        "powers, p falling from 1 (p-annealing, arXiv 2408.00113); tanh, the sum of "
        "tanh(tanh_scale * code)",
        choices=("none", "l1", "lp", "tanh"),
    )
    sparsity_coefficient: float = setting(0.0, "factor of the sparsity penalty", NOT_NEGATIVE)
    sparsity_warmup_steps: int | None = setting(
        None,
        "steps over which the sparsity coefficient rises linearly from 0; None is 0 with "
        "target_l0, where training starts, else 2000 (dictionary_learning) but at most a fifth of "
        "the run",
        NATURAL,
    )
    sparsity_norm_weighted: bool = setting(
        False,
        "multiply codes by the norm of their decoder row in the penalties l1, lp and tanh "
        "(Conerly et al., April 2024; Anthropic, January 2025)",
    )
    target_l0: float | None = setting(
        None,
        "L0 to reach: the sparsity coefficient grows or shrinks by 10 / steps of itself each step "
        "(noanabeshima), or the penalty target_l0 aims at it; None leaves the coefficient alone",
        POSITIVE,
    )
    tanh_scale: float = setting(
        4.0,
        "factor of the codes in the penalty tanh (4: Anthropic, January 2025; SAELens)",
        POSITIVE,
    )
    p_end: float = setting(
        0.2,
        "last exponent p of the penalty lp, which falls from 1; at each change the sparsity "
        "coefficient is rescaled so that the penalty keeps its size (dictionary_learning)",
        FRACTION,
    )
    p_steps: int = setting(10, "number of values that p of the penalty lp takes", POSITIVE_INTEGER)
    p_start: float = setting(
        0.25, "fraction of the run after which p of the penalty lp falls", FRACTION
    )
    auxk_alpha: float = setting(
        1 / 32,
        "weight of the AuxK loss on dead latents (1/32: OpenAI, dictionary_learning); 0 is off",
        NOT_NEGATIVE,
    )
    k_aux: int | None = setting(
        None,
        "dead latents kept per token in AuxK; None is d_in / 2 (sparsify, dictionary_learning)",
        POSITIVE_INTEGER,
    )
    auxk_latents: int = setting(
        4096,
        "at most this many dead latents take part in AuxK, the longest dead first",
        POSITIVE_INTEGER,
    )
    dead_after_tokens: int = setting(
        10_000_000,
        "tokens without firing after which a latent is dead (10M: OpenAI, sparsify, "
        "dictionary_learning)",
        POSITIVE_INTEGER,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity == "target_l0" and self.target_l0 is None:
            raise ValueError("target_l0: expected a number with sparsity 'target_l0', got None")


@dataclasses.dataclass(frozen=True)
class PrefixObjective(ObjectiveConfig):
    """Objective of architectures that may be Matryoshka SAEs, reconstructing from prefixes."""

    matryoshka: Literal["mean", "sum"] = setting(
        "mean",
        "squared errors of a Matryoshka SAE's prefixes: mean averages them (dictionary_learning, "
        "which divides by their number twice), sum adds them up (SAELens)",
    )
    random_prefixes: int = setting(
        0,
        "number of prefixes drawn each step by a Pareto law, besides all latents (noanabeshima); "
        "0 uses the SAE's groups",
        NATURAL,
    )


@dataclasses.dataclass(frozen=True)
class PenalisedObjective(ObjectiveConfig):
    """Objective of architectures sparse by a penalty: by default L1, with L0 held at 32."""

    loss: Literal["fvu", "mse"] = "mse"
    sparsity: str = "l1"
    sparsity_coefficient: float = 3.0
    target_l0: float | None = 32.0
    auxk_alpha: float = 0.0
