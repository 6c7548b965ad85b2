"""The data of a report as plain values, which any trainer can fill in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .latent_table import LatentTable


@dataclass(frozen=True)
class CurvePoint:
    """One logged training step.

    Attributes:
        step: optimiser step, counted from 0 or 1 as the trainer likes.
        loss: training loss, in whatever unit the trainer minimises.
        fvu: fraction of variance unexplained on the training batch (0 perfect, 1 the mean).
        l0: mean number of latents that fire per token.
        dead_fraction: share of latents the trainer counts as dead, 0 to 1.
    """

    step: int
    loss: float
    fvu: float
    l0: float
    dead_fraction: float


@dataclass(frozen=True)
class TokenContext:
    """A window of tokens around one token on which a latent fires strongly.

    Attributes:
        tokens: the window, one string per token.
        activations: this latent's activation at each token, same length as ``tokens``.
        peak: index into the window of the token it was chosen for.

    Raises:
        ValueError: lengths differ, or ``peak`` lies outside the window.
    """

    tokens: list[str]
    activations: list[float]
    peak: int

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.activations):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.activations)} activations")
        if not 0 <= self.peak < len(self.tokens):
            raise ValueError(f"peak {self.peak} is outside a window of {len(self.tokens)} tokens")


@dataclass(frozen=True)
class LatentExamples:
    """The contexts in which one latent fires most strongly, strongest first.

    Attributes:
        latent: index of the latent in the dictionary.
        density: fraction of held-out tokens on which it fires, 0 to 1.
        max_activation: its largest activation; the colour scale of its contexts ends there.
        contexts: windows around its strongest tokens.
    """

    latent: int
    density: float
    max_activation: float
    contexts: list[TokenContext]


@dataclass(frozen=True, eq=False)
class RunReport:
    """Everything the page of one training run shows.

    Attributes:
        title: headline of the page.
        subtitle: one sentence under it.
        facts: how the run was made (model, layer, tokens, d_in, n_latents, k, steps, seconds,
            machine, versions, ...), shown in the order given.
        metrics: results by name (fvu, explained_variance, l0, cosine, dead_fraction,
            dense_fraction, ...). Values that are not finite are shown as "n/a".
        curve: training curve, in step order; may be empty.
        measured_fvu: fraction of variance unexplained of the trained SAE, if measured.
        latent_density: ``[F]``, fraction of tokens on which each latent fires, if measured.
        decoder_cosine: ``[F]``, each latent's largest cosine to another latent's decoder row.
        examples: latents to show in context; may be empty. None: nobody looked for any.
        command: shell command that repeats the run, if there is one.
        dead_rule: what ``metrics["dead_fraction"]`` counts, to follow "12 of 3,072 latents".
        measured_on: which tokens all this was measured on: "held-out", "training", ...
        latents: all latents, for a browser of them beside the page; None for no browser.

    Raises:
        ValueError: the two tensors are not vectors of one length.
    """

    title: str
    subtitle: str
    facts: dict[str, str]
    metrics: dict[str, float]
    curve: list[CurvePoint]
    measured_fvu: float | None
    latent_density: Tensor | None = field(repr=False)
    decoder_cosine: Tensor = field(repr=False)
    examples: list[LatentExamples] | None = field(repr=False)
    command: str | None = None
    dead_rule: str = "never fired on held-out tokens"
    measured_on: str = "held-out"
    latents: LatentTable | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        cosine = tuple(self.decoder_cosine.shape)
        density = cosine if self.latent_density is None else tuple(self.latent_density.shape)
        if len(density) != 1 or density != cosine:
            raise ValueError(
                "latent_density and decoder_cosine must both be [F], "
                f"got {list(density)} and {list(cosine)}"
            )

    @property
    def n_latents(self) -> int:
        """Number of latents F."""
        return int(self.decoder_cosine.numel())

    @property
    def never_fired(self) -> int | None:
        """Number of latents that fire on none of the tokens measured, if that was done."""
        if self.latent_density is None:
            return None
        return int((self.latent_density == 0).sum())
