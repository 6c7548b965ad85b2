"""What an SAE is, apart from its weights: the settings that all architectures share."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import ClassVar, Literal

from sae_kernels.config.base import POSITIVE_INTEGER, SCALE, Settings, about, setting

Size = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SAEConfig(Settings):
    """Widths, layers, the place of the biases and the scale: what every SAE has."""

    architecture: ClassVar[str] = ""

    d_in: int = field(metadata=about("width of the activations of one layer, D", POSITIVE_INTEGER))
    n_latents: int = field(metadata=about("latents, F", POSITIVE_INTEGER))
    _: dataclasses.KW_ONLY
    d_out: int | None = setting(
        None,
        "width of what is reconstructed; None is d_in. A transcoder reads one activation and "
        "writes another",
        POSITIVE_INTEGER,
    )
    n_layers: int = setting(
        1,
        "layers (or models) that a crosscoder reads and writes together; its rows are [n_layers "
        "* d_in], one layer after the other",
        POSITIVE_INTEGER,
    )
    skip: bool = setting(
        False,
        "add x W_skip^T to the reconstruction (skip transcoder, arXiv 2501.18823)",
    )
    subtract_b_dec: bool = setting(
        True,
        "encode x - b_dec (sparsify, dictionary_learning, OpenAI) or x (Qwen-Scope, Gemma "
        "Scope). Always x where the output is not the input",
    )
    unit_norm_decoder: bool = setting(
        True,
        "keep decoder rows (of each layer) at unit norm while training",
    )
    decoder_norm: Literal["joint", "sum", "mixed"] = setting(
        "joint",
        "what weighs a latent of several layers where norms count: joint, the norm of all "
        "layers' rows together, sum of the layers' norms, or mixed, joint + sum / 10 (the three "
        "of Minder et al.'s crosscoders, arXiv 2504.02922)",
    )
    activation_scale: float = setting(
        1.0,
        "activations are multiplied by it before the SAE sees them; 1 for none. Saving folds it "
        "into the weights, so saved weights read raw activations",
        SCALE,
    )
    target_scale: float = setting(1.0, "the same for the targets of a transcoder", SCALE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transcodes and self.subtract_b_dec:
            raise ValueError(
                "subtract_b_dec: expected false where the output is not the input (d_out or skip "
                "is given), got true"
            )
        if self.target_scale != 1 and not self.transcodes:
            raise ValueError(
                f"target_scale: expected 1 where the input is its own target, got "
                f"{self.target_scale!r}"
            )

    @property
    def transcodes(self) -> bool:
        """Whether the target is another activation than the input."""
        return self.d_out is not None or self.skip

    @property
    def largest_k(self) -> int:
        """How many latents a token can keep at most."""
        return self.n_latents

    @property
    def n_encoded(self) -> int:
        """How many latents each token is multiplied with."""
        return self.n_latents

    @property
    def input_width(self) -> int:
        """Width of the rows that the encoder reads: all layers together."""
        return self.n_layers * self.d_in

    @property
    def output_width(self) -> int:
        """Width of the rows that the decoder writes."""
        return self.n_layers * (self.d_in if self.d_out is None else self.d_out)

    def shapes(self) -> dict[str, Size]:
        """The shape of every saved tensor, by name; an architecture adds its own."""
        sizes: dict[str, Size] = {
            "W_enc": (self.n_latents, self.input_width),
            "b_enc": (self.n_latents,),
            "W_dec": (self.n_latents, self.output_width),
            "b_dec": (self.output_width,),
        }
        if self.skip:
            sizes["W_skip"] = (self.output_width, self.input_width)
        return sizes

    def expect_at_most_n_latents(self, name: str) -> None:
        """Raises ValueError for a setting above n_latents."""
        if getattr(self, name) > self.n_latents:
            raise ValueError(
                f"{name}: expected at most n_latents = {self.n_latents}, got {getattr(self, name)}"
            )
