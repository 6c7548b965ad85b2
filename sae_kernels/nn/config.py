"""What an SAE is, apart from its weights: one configuration an architecture."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, TypeVar

from sae_kernels.errors import name_hint

_Config = TypeVar("_Config", bound="SAEConfig")


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What all architectures share: widths, layers, the place of the biases, the scale.

    Attributes:
        d_in: width of the activations of one layer, D.
        n_latents: F.
        d_out: width of what is reconstructed; None is d_in. A transcoder reads one activation and
            writes another.
        n_layers: layers (or models) that a crosscoder reads and writes together; its rows are
            [n_layers * d_in], one layer after the other.
        skip: add ``x W_skip^T`` to the reconstruction (skip transcoder, arXiv 2501.18823).
        subtract_b_dec: encode ``x - b_dec`` (sparsify, dictionary_learning, OpenAI) or ``x``
            (Qwen-Scope, Gemma Scope). Always ``x`` where the output is not the input.
        unit_norm_decoder: keep decoder rows (of each layer) at unit norm while training.
        decoder_norm: what weighs a latent of several layers where norms count: "joint", the norm
            of all layers' rows together, "sum" of the layers' norms, or "mixed", joint + sum / 10
            (the three of Minder et al.'s crosscoders, arXiv 2504.02922).
        activation_scale: activations are multiplied by it before the SAE sees them; 1 for none.
            Saving folds it into the weights, so saved weights read raw activations.
        target_scale: the same for the targets of a transcoder.
    """

    architecture: ClassVar[str] = ""

    d_in: int
    n_latents: int
    _: dataclasses.KW_ONLY
    d_out: int | None = None
    n_layers: int = 1
    skip: bool = False
    subtract_b_dec: bool = True
    unit_norm_decoder: bool = True
    decoder_norm: Literal["joint", "sum", "mixed"] = "joint"
    activation_scale: float = 1.0
    target_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("d_in", "n_latents", "n_layers"):
            self._expect(name, self._whole(name), "a positive integer")
        self._expect("d_out", self.d_out is None or self._whole("d_out"), "a positive integer")
        for field in dataclasses.fields(self):
            if field.type == "bool":
                value = getattr(self, field.name)
                self._expect(field.name, isinstance(value, bool), "true or false")
        self._choice("decoder_norm", ("joint", "sum", "mixed"))
        for name in ("activation_scale", "target_scale"):
            self._expect(name, self._positive(name), "a positive finite number")
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
    def latents_met(self) -> int:
        """How many latents a token is multiplied with."""
        return self.n_latents

    @property
    def input_width(self) -> int:
        """Of the rows that the encoder reads: all layers together."""
        return self.n_layers * self.d_in

    @property
    def output_width(self) -> int:
        """Of the rows that the decoder writes."""
        return self.n_layers * (self.d_in if self.d_out is None else self.d_out)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they go into config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """The inverse; unknown keys are refused with the nearest known name."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"config: unknown key {key!r}; {name_hint(key, known)}")
        missing = [key for key in ("d_in", "n_latents") if key not in values]
        if missing:
            raise ValueError(f"config: expected the key {missing[0]!r}, it is not there")
        return cls(**values)

    def _expect(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        self._expect(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")

    def _whole(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    def _positive(self, name: str) -> bool:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and 0 < value < math.inf

    def _at_most_n_latents(self, name: str) -> None:
        if getattr(self, name) > self.n_latents:
            raise ValueError(
                f"{name}: expected at most n_latents = {self.n_latents}, got {getattr(self, name)}"
            )

    def _check_groups(self, groups: tuple[int, ...] | None) -> None:
        sizes = () if groups is None else groups
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes)
        if groups is not None and not (whole and sum(sizes) == self.n_latents):
            total = f"{sum(sizes)} in all" if whole and sizes else "no such list"
            raise ValueError(
                f"groups: expected positive integers that add up to n_latents = {self.n_latents}, "
                f"got {groups!r} ({total})"
            )


@dataclasses.dataclass(frozen=True)
class TopKConfig(SAEConfig):
    """The k largest latents of every token (Gao et al., arXiv 2406.04093).

    Attributes:
        k: latents kept per token, K.
        relu: "after" the selection (OpenAI, SAELens), "before" it (sparsify, dictionary_learning)
            or "none" (Qwen-Scope: values may be negative). The first two are the same function
            here: a kept zero adds nothing, has no gradient and does not count as fired.
        rank_by_decoder_norm: rank latents by ``h |W_dec|`` (SAELens'
            rescale_acts_by_decoder_norm).
        groups: sizes of a Matryoshka SAE's groups of latents (arXiv 2503.17547); None for none.
    """

    architecture: ClassVar[str] = "topk"

    k: int = 32
    relu: Literal["after", "before", "none"] = "after"
    rank_by_decoder_norm: bool = False
    groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("k", self._whole("k"), "a positive integer")
        self._at_most_n_latents("k")
        self._choice("relu", ("after", "before", "none"))
        _as_tuple(self, "groups")
        self._check_groups(self.groups)


@dataclasses.dataclass(frozen=True)
class SwitchConfig(SAEConfig):
    """One of several small TopK SAEs for every token (Mudide et al., arXiv 2410.08201).

    Attributes:
        k: latents kept per token, K.
        n_experts: E; each has n_latents / n_experts latents, one expert's after the other's.
        gate: what codes are multiplied with: the "softmax" probability of the token's expert, which
            is how reconstruction teaches the router, or "heaviside": 1, and the router learns from
            the load-balance loss alone.
        shared_expert: the first expert is for every token, without gate, and the router chooses
            among the others; the k are the largest of both experts' gated codes.
        encoder_bias: train b_enc; false keeps it at 0 (the paper, amudide/switch_sae, whose files
            have no place for it).
    """

    architecture: ClassVar[str] = "switch"

    k: int = 32
    n_experts: int = 8
    gate: Literal["softmax", "heaviside"] = "softmax"
    shared_expert: bool = False
    encoder_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "n_experts"):
            self._expect(name, self._whole(name), "a positive integer")
        self._choice("gate", ("softmax", "heaviside"))
        if self.n_latents % self.n_experts:
            raise ValueError(
                f"n_experts: expected a divisor of n_latents = {self.n_latents}, got "
                f"{self.n_experts}"
            )
        if self.k > self.expert_width:
            raise ValueError(
                f"k: expected at most {self.expert_width}, the latents of one of {self.n_experts} "
                f"experts, got {self.k}"
            )
        if self.shared_expert and self.n_experts < 2:
            raise ValueError(
                "shared_expert: expected false with n_experts = 1, there is none to choose from"
            )

    @property
    def expert_width(self) -> int:
        """Latents of an expert, F/E."""
        return self.n_latents // self.n_experts

    @property
    def largest_k(self) -> int:
        """Latents of an expert: the others are not looked at."""
        return self.expert_width

    @property
    def latents_met(self) -> int:
        """Those of its expert, and of the shared one."""
        return self.expert_width * (1 + self.shared_expert)

    @property
    def n_routed(self) -> int:
        """Experts that the router chooses among."""
        return self.n_experts - self.shared_expert


@dataclasses.dataclass(frozen=True)
class BatchTopKConfig(SAEConfig):
    """The k B largest latents of a batch of B tokens (Bussmann et al., arXiv 2412.06410).

    Attributes:
        k: latents kept per token on average; may be a fraction (int(k B) are kept in a batch).
        rank_by_decoder_norm: rank latents by ``h |W_dec|`` (BatchTopK crosscoders).
        groups: sizes of a Matryoshka SAE's groups of latents (arXiv 2503.17547); None for none.
        threshold_rule: how the threshold of inference follows the smallest kept key of the
            batches: "sae_lens", from 0 on, 0.99 of it and 0.01 of the new; or
            "dictionary_learning", the first batch's, then 0.999 and 0.001, which needs some
            thousands of steps to forget where it began.
    """

    architecture: ClassVar[str] = "batchtopk"

    k: float = 32
    rank_by_decoder_norm: bool = False
    groups: tuple[int, ...] | None = None
    threshold_rule: Literal["sae_lens", "dictionary_learning"] = "sae_lens"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("k", self._positive("k"), "a positive number")
        self._at_most_n_latents("k")
        self._choice("threshold_rule", ("dictionary_learning", "sae_lens"))
        _as_tuple(self, "groups")
        self._check_groups(self.groups)


@dataclasses.dataclass(frozen=True)
class JumpReLUConfig(SAEConfig):
    """Every latent above a threshold of its own (Rajamanoharan et al., arXiv 2407.14435).

    Attributes:
        threshold_init: where the thresholds start (in the scale of training).
        bandwidth: width of the rectangle that stands for the step's derivative.
        log_threshold: train the thresholds' logarithms (SAELens, Gemma Scope) or the thresholds
            themselves (dictionary_learning). Either way they are fp32.
    """

    architecture: ClassVar[str] = "jumprelu"

    threshold_init: float = 0.01
    bandwidth: float = 0.05
    log_threshold: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("bandwidth", self._positive("bandwidth"), "a positive number")
        if self.log_threshold:
            what = "a positive number (log_threshold needs its logarithm)"
            self._expect("threshold_init", self._positive("threshold_init"), what)
        elif not 0 <= self.threshold_init < math.inf:
            self._expect("threshold_init", False, "a number of at least 0")


@dataclasses.dataclass(frozen=True)
class ReLUConfig(SAEConfig):
    """Every positive latent (Bricken et al. 2023; April update of Conerly et al. 2024)."""

    architecture: ClassVar[str] = "relu"


@dataclasses.dataclass(frozen=True)
class GatedConfig(SAEConfig):
    """Latents gated by one reading of the encoder and sized by another (arXiv 2404.16014).

    Attributes:
        frozen_decoder: in the auxiliary loss that trains the gate the decoder gets no gradient
            (the paper, dictionary_learning), or, if false, it does (SAELens).
    """

    architecture: ClassVar[str] = "gated"

    frozen_decoder: bool = True


def _as_tuple(config: SAEConfig, name: str) -> None:
    # JSON and TOML have lists; a frozen configuration is hashable.
    if isinstance(value := getattr(config, name), list):
        object.__setattr__(config, name, tuple(value))
