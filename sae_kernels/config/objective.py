"""What a training step minimises: the settings that the objectives of all architectures share."""

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
    """The loss, the sparsity penalty and AuxK; an architecture's own class adds what it has.

    Penalties are per token and are described in docs/architectures.md.
    """

    table = "objective"

    loss: Literal["fvu", "mse"] = setting(
        "fvu",
        "fvu, squared error over the batch's variance (sparsify), or mse, squared error per "
        "token (dictionary_learning, SAELens)",
    )
    sparsity: str = setting(
        "none",
        "the penalty added to the loss: none; l1, the sum of the codes; lp, the sum of their "
        "p-th powers, p falling from 1 (p-annealing, arXiv 2408.00113); tanh, the sum of "
        "tanh(tanh_scale * code)",
        choices=("none", "l1", "lp", "tanh"),
    )
    sparsity_coefficient: float = setting(0.0, "multiplies the penalty", NOT_NEGATIVE)
    sparsity_warmup_steps: int | None = setting(
        None,
        "the coefficient rises linearly from 0 over these steps; None is 2000 "
        "(dictionary_learning) but at most a fifth of the run",
        NATURAL,
    )
    sparsity_norm_weighted: bool = setting(
        False,
        "weigh codes by the norm of their decoder row in l1, lp and tanh (Conerly et al., April "
        "2024; Anthropic, January 2025)",
    )
    target_l0: float | None = setting(
        None,
        "the coefficient follows it: each step it grows or shrinks by 10 / steps of itself "
        "(noanabeshima); with target_l0 as the penalty, what that aims at. None: it stays",
        POSITIVE,
    )
    tanh_scale: float = setting(
        4.0,
        "of the penalty tanh (4: Anthropic, January 2025; SAELens)",
        POSITIVE,
    )
    p_end: float = setting(
        0.2,
        "p takes p_steps values from 1 to p_end, the first change after the part p_start of the "
        "run; at each the coefficient is scaled so that the penalty stays what it was "
        "(dictionary_learning)",
        FRACTION,
    )
    p_steps: int = setting(10, "see p_end", POSITIVE_INTEGER)
    p_start: float = setting(0.25, "see p_end", FRACTION)
    auxk_alpha: float = setting(
        1 / 32,
        "weight of AuxK, 1/32 (OpenAI, dictionary_learning); 0 is off",
        NOT_NEGATIVE,
    )
    k_aux: int | None = setting(
        None,
        "dead latents per token in AuxK; None is d_in / 2 (sparsify, dictionary_learning)",
        POSITIVE_INTEGER,
    )
    auxk_latents: int = setting(
        4096,
        "at most this many dead latents take part in AuxK, the longest dead first",
        POSITIVE_INTEGER,
    )
    dead_after_tokens: int = setting(
        10_000_000,
        "a latent is dead after so many tokens without firing (10M: OpenAI, sparsify, "
        "dictionary_learning)",
        POSITIVE_INTEGER,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity == "target_l0" and self.target_l0 is None:
            raise ValueError("target_l0: expected a number with sparsity 'target_l0', got None")


@dataclasses.dataclass(frozen=True)
class PrefixObjective(ObjectiveConfig):
    """Settings of architectures whose first latents may reconstruct alone (Matryoshka SAEs)."""

    matryoshka: Literal["mean", "sum"] = setting(
        "mean",
        "squared errors of the prefixes are weighed equally and add up to one (mean, "
        "dictionary_learning up to its second 1 / G) or count in full each (sum, SAELens)",
    )
    random_prefixes: int = setting(
        0,
        "draw the prefixes anew each step, so many and the whole, sizes by a Pareto law "
        "(noanabeshima); 0: the SAE's own groups",
        NATURAL,
    )


@dataclasses.dataclass(frozen=True)
class PenalisedObjective(ObjectiveConfig):
    """Settings of architectures that are sparse by their penalty: by default L1, L0 held at 32."""

    loss: Literal["fvu", "mse"] = "mse"
    sparsity: str = "l1"
    sparsity_coefficient: float = 3.0
    target_l0: float | None = 32.0
    auxk_alpha: float = 0.0
