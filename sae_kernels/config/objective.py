"""What a training step minimises: the settings that the objectives of all architectures share."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from sae_kernels.config.base import (
    FRACTION,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INTEGER,
    Settings,
    about,
)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Settings):
    """The loss, the sparsity penalty and AuxK; an architecture's own class adds what it has.

    Penalties are per token and are described in docs/architectures.md.
    """

    table = "objective"

    loss: Literal["fvu", "mse"] = field(
        default="fvu",
        metadata=about(
            "fvu, squared error over the batch's variance (sparsify), or mse, squared "
            "error per token (dictionary_learning, SAELens)"
        ),
    )
    sparsity: str = field(
        default="none",
        metadata=about(
            "the penalty added to the loss: none; l1, the sum of the codes; lp, the sum of "
            "their p-th powers, p falling from 1 (p-annealing, arXiv 2408.00113); tanh, "
            "the sum of tanh(tanh_scale * code)",
            choices=("none", "l1", "lp", "tanh"),
        ),
    )
    sparsity_coefficient: float = field(
        default=0.0, metadata=about("multiplies the penalty", NOT_NEGATIVE)
    )
    sparsity_warmup_steps: int | None = field(
        default=None,
        metadata=about(
            "the coefficient rises linearly from 0 over these steps; None is 2000 "
            "(dictionary_learning) but at most a fifth of the run",
            NATURAL,
        ),
    )
    sparsity_norm_weighted: bool = field(
        default=False,
        metadata=about(
            "weigh codes by the norm of their decoder row in l1, lp and tanh (Conerly et "
            "al., April 2024; Anthropic, January 2025)"
        ),
    )
    target_l0: float | None = field(
        default=None,
        metadata=about(
            "the coefficient follows it: each step it grows or shrinks by 10 / steps of "
            "itself (noanabeshima); with target_l0 as the penalty, what that aims at. "
            "None: it stays",
            POSITIVE,
        ),
    )
    tanh_scale: float = field(
        default=4.0,
        metadata=about("of the penalty tanh (4: Anthropic, January 2025; SAELens)", POSITIVE),
    )
    p_end: float = field(
        default=0.2,
        metadata=about(
            "p takes p_steps values from 1 to p_end, the first change after the part "
            "p_start of the run; at each the coefficient is scaled so that the penalty "
            "stays what it was (dictionary_learning)",
            FRACTION,
        ),
    )
    p_steps: int = field(default=10, metadata=about("see p_end", POSITIVE_INTEGER))
    p_start: float = field(default=0.25, metadata=about("see p_end", FRACTION))
    auxk_alpha: float = field(
        default=1 / 32,
        metadata=about(
            "weight of AuxK, 1/32 (OpenAI, dictionary_learning); 0 is off", NOT_NEGATIVE
        ),
    )
    k_aux: int | None = field(
        default=None,
        metadata=about(
            "dead latents per token in AuxK; None is d_in / 2 (sparsify, dictionary_learning)",
            POSITIVE_INTEGER,
        ),
    )
    auxk_latents: int = field(
        default=4096,
        metadata=about(
            "at most this many dead latents take part in AuxK, the longest dead first",
            POSITIVE_INTEGER,
        ),
    )
    dead_after_tokens: int = field(
        default=10_000_000,
        metadata=about(
            "a latent is dead after so many tokens without firing (10M: OpenAI, sparsify, "
            "dictionary_learning)",
            POSITIVE_INTEGER,
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity == "target_l0" and self.target_l0 is None:
            raise ValueError("target_l0: expected a number with sparsity 'target_l0', got None")


@dataclasses.dataclass(frozen=True)
class PrefixObjective(ObjectiveConfig):
    """Settings of architectures whose first latents may reconstruct alone (Matryoshka SAEs)."""

    matryoshka: Literal["mean", "sum"] = field(
        default="mean",
        metadata=about(
            "squared errors of the prefixes are weighed equally and add up to one (mean, "
            "dictionary_learning up to its second 1 / G) or count in full each (sum, "
            "SAELens)"
        ),
    )
    random_prefixes: int = field(
        default=0,
        metadata=about(
            "draw the prefixes anew each step, so many and the whole, sizes by a Pareto "
            "law (noanabeshima); 0: the SAE's own groups",
            NATURAL,
        ),
    )


@dataclasses.dataclass(frozen=True)
class PenalisedObjective(ObjectiveConfig):
    """Settings of architectures that are sparse by their penalty: by default L1, L0 held at 32."""

    loss: Literal["fvu", "mse"] = "mse"
    sparsity: str = "l1"
    sparsity_coefficient: float = 3.0
    target_l0: float | None = 32.0
    auxk_alpha: float = 0.0
