"""Settings of an SAE that all architectures share: widths, biases, norms and scales."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import ClassVar, Literal

from sae_kernels.config.base import POSITIVE_INTEGER, SCALE, Settings, about, setting

Size = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SAEConfig(Settings):
    """Settings that every SAE has; an architecture's own class adds to them."""

    architecture: ClassVar[str] = ""

    d_in: int = field(metadata=about("width of the activations of one layer, D", POSITIVE_INTEGER))
    n_latents: int = field(metadata=about("number of latents, F", POSITIVE_INTEGER))
    _: dataclasses.KW_ONLY
    d_out: int | None = setting(
        None,
        "width of the output, of a transcoder that reconstructs another activation than its "
        "input; None is d_in",
        POSITIVE_INTEGER,
    )
    n_layers: int = setting(
        1,
        "layers (or models) that a crosscoder reads and writes together; its rows are [n_layers * "
        "d_in], one layer after the other",
        POSITIVE_INTEGER,
    )
    skip: bool = setting(
        False, "add x W_skip^T to the reconstruction (skip transcoder, arXiv 2501.18823)"
    )
    subtract_b_dec: bool = setting(
        True,
        "encode x - b_dec (sparsify, dictionary_learning, OpenAI) or x (Qwen-Scope, Gemma Scope, "
        "all transcoders)",
    )
    unit_norm_decoder: bool = setting(
        True, "keep decoder rows (of each layer) at unit norm while training"
    )
    decoder_norm: Literal["joint", "sum", "mixed"] = setting(
        "joint",
        "decoder norm of a crosscoder's latent, in ranking and penalties: joint, the norm over all "
        "layers; sum, the sum of the layers' norms; or mixed, joint + sum / 10 (Minder et al., "
        "arXiv 2504.02922)",
    )
    activation_scale: float = setting(
        1.0,
        "factor of the activations before the encoder, 1 for none; saving folds it into the "
        "weights, which then read raw activations",
        SCALE,
    )
    target_scale: float = setting(
        1.0, "factor of a transcoder's targets, as activation_scale", SCALE
    )

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
        """Whether the target is another activation than the input (a transcoder)."""
        return self.d_out is not None or self.skip

    @property
    def largest_k(self) -> int:
        """The largest number of latents that a token can keep."""
        return self.n_latents

    @property
    def n_encoded(self) -> int:
        """Latents that each token is multiplied with."""
        return self.n_latents

    @property
    def input_width(self) -> int:
        """Width of the encoder's input rows: ``n_layers * d_in``."""
        return self.n_layers * self.d_in

    @property
    def output_width(self) -> int:
        """Width of the decoder's output rows: ``n_layers`` times d_out or d_in."""
        return self.n_layers * (self.d_in if self.d_out is None else self.d_out)

    @property
    def row_parts(self) -> int:
        """Equal parts of a row of W_dec that have a norm of their own: a crosscoder's layers."""
        return self.n_layers

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
