"""What a TopK SAE is, apart from its weights."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from sae_kernels.errors import name_hint

RELU_PLACES = ("after", "before", "none")


@dataclasses.dataclass(frozen=True)
class TopKConfig:
    """Shape and variant of a TopK SAE (peers differ in each of the options).

    Attributes:
        d_in: width of the activations, D.
        n_latents: F.
        k: latents kept per token, K.
        subtract_b_dec: encode ``x - b_dec`` (sparsify, dictionary_learning, OpenAI) or ``x``
            (Qwen-Scope).
        relu: "after" the selection (OpenAI, SAELens), "before" it (sparsify, dictionary_learning)
            or "none" (Qwen-Scope: values may be negative). The first two are the same function
            here: a kept zero adds nothing, has no gradient and does not count as fired.
        rank_by_decoder_norm: rank latents by ``h |W_dec|`` (SAELens'
            rescale_acts_by_decoder_norm).
        unit_norm_decoder: keep decoder rows at unit norm while training.
        activation_scale: activations are multiplied by it before the SAE sees them; 1 for none.
            Saving folds it into the biases, so saved weights read raw activations.
    """

    d_in: int
    n_latents: int
    k: int = 32
    subtract_b_dec: bool = True
    relu: Literal["after", "before", "none"] = "after"
    rank_by_decoder_norm: bool = False
    unit_norm_decoder: bool = True
    activation_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("d_in", "n_latents", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.k > self.n_latents:
            raise ValueError(f"k: expected at most n_latents = {self.n_latents}, got {self.k}")
        if self.relu not in RELU_PLACES:
            raise ValueError(f"relu: expected one of {', '.join(RELU_PLACES)}, got {self.relu!r}")
        for name in ("subtract_b_dec", "rank_by_decoder_norm", "unit_norm_decoder"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}: expected true or false, got {value!r}")
        scale = self.activation_scale
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number or not 0 < scale < float("inf"):
            raise ValueError(f"activation_scale: expected a positive finite number, got {scale!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they go into config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TopKConfig:
        """The inverse; unknown keys are refused with the nearest known name."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"config: unknown key {key!r}; {name_hint(key, known)}")
        missing = [key for key in ("d_in", "n_latents") if key not in values]
        if missing:
            raise ValueError(f"config: expected the key {missing[0]!r}, it is not there")
        return cls(**values)
