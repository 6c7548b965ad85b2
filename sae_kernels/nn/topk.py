"""TopK SAEs: the k largest latents of every token."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.config.base import POSITIVE_INTEGER, setting
from sae_kernels.config.objective import ObjectiveConfig, PrefixObjective
from sae_kernels.config.sae import SAEConfig
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.initialise import bounds_at, scale_encoder_
from sae_kernels.nn.objective import NESTED, check_groups, prefixes_of
from sae_kernels.nn.registry import TRANSCODES, Preset, register
from sae_kernels.primitives.select_topk import select_topk

if TYPE_CHECKING:
    from sae_kernels.nn.objective import Context, Prefixes, Reconstruction
    from sae_kernels.step.ranks import Ranks

_MULTI, _MULTI_WEIGHT = 4, 1 / 8  # multi-TopK reconstructs from 4k latents too


@dataclasses.dataclass(frozen=True)
class TopKConfig(SAEConfig):
    """Settings of a TopK SAE (Gao et al., arXiv 2406.04093).

    Example:
        >>> TopKConfig(768, 24576, k=64).to_dict()["k"]
        64
    """

    architecture: ClassVar[str] = "topk"

    k: int = setting(32, "latents kept per token, K", POSITIVE_INTEGER)
    relu: Literal["after", "before", "none"] = setting(
        "after",
        "ReLU after the selection (OpenAI, SAELens), before it (sparsify, dictionary_learning) or "
        "none (Qwen-Scope: codes may be negative). The first two are the same function here: a "
        "kept zero adds nothing, has no gradient and does not count as fired",
    )
    rank_by_decoder_norm: bool = setting(
        False,
        "rank latents by pre-activation times decoder norm (SAELens' rescale_acts_by_decoder_norm)",
    )
    groups: tuple[int, ...] | None = setting(
        None,
        "sizes of the latent groups of a Matryoshka SAE (arXiv 2503.17547); None: not Matryoshka",
    )
    by_magnitude: bool = setting(
        False,
        "rank latents by the magnitude of their pre-activations, whose sign codes keep (AbsTopK, "
        "arXiv 2510.00404); needs relu none",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_most_n_latents("k")
        check_groups(self.groups, self.n_latents)
        if self.by_magnitude:
            self.expect("relu", self.relu == "none", "'none' with by_magnitude (codes keep signs)")


@dataclasses.dataclass(frozen=True)
class TopKObjective(PrefixObjective):
    """Training objective of a TopK SAE: the shared settings and multi-TopK.

    Example:
        >>> TopKObjective(multi_topk=True).loss
        'fvu'
    """

    multi_topk: bool = setting(
        False,
        "add 1/8 of the FVU of a second reconstruction, from 4k latents (arXiv 2406.04093, A.5; "
        "sparsify)",
    )


@register
class TopKSAE(SparseAutoencoder):
    """TopK SAE, ``x_hat = b_dec + W_dec^T topk(W_enc (x - b_dec) + b_enc)`` (arXiv 2406.04093).

    Arguments and weights: :class:`~sae_kernels.nn.SparseAutoencoder`; settings:
    :class:`TopKConfig`. The encoder starts as a copy of the decoder, whose rows are random unit
    vectors.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import TopKSAE
        >>> sae = TopKSAE(8, 32, k=4)
        >>> output = sae(torch.randn(5, 8))
        >>> output.x_hat.shape, output.codes.indices.shape
        (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    config: TopKConfig
    config_class = TopKConfig
    objective_class = TopKObjective
    keeps_fixed_number: ClassVar[bool] = True
    spreads: ClassVar[bool] = True
    presets: ClassVar[dict[str, Preset]] = {
        "topk": Preset("the k largest latents of every token"),
        "abstopk": Preset(
            "the k latents of largest magnitude, of either sign",
            sae={"relu": "none", "by_magnitude": True},
        ),
        "multi_topk": Preset(
            "TopK with a second reconstruction from 4k latents", objective={"multi_topk": True}
        ),
        "matryoshka_topk": Preset(
            "TopK, prefixes of the latents reconstruct alone", sae={"groups": NESTED}
        ),
        "transcoder": Preset("TopK from one activation to another", sae=TRANSCODES, data="target"),
        "skip_transcoder": Preset(
            "TopK from one activation to another, with a linear skip connection",
            sae={**TRANSCODES, "skip": True},
            data="target",
        ),
    }

    def start_training_(self, x: torch.Tensor, objective: Any, ranks: Ranks | None = None) -> None:
        """Scales W_enc by the one factor with which k latents a token reconstruct a sample best."""
        if self.config.by_magnitude:
            return  # codes of either sign overlap less, and bounds have one side
        scale_encoder_(self, x, bounds_at(self, x, self.config.k), ranks)

    def select(
        self, x_centred: torch.Tensor, *, W_enc: torch.Tensor | None = None, k: float | None = None
    ) -> SparseCodes:
        """The k largest pre-activations of each token, or those of largest magnitude, in order."""
        kept: Any = self.config.k if k is None else k
        return functional.encode_topk(
            x_centred,
            self.W_enc if W_enc is None else W_enc,
            self.b_enc,
            kept,
            relu=False,
            rank_scale=self.rank_scale(),
            narrow=self.narrow,
            by_magnitude=self.config.by_magnitude,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )

    def select_in(self, context: Context, W_enc: torch.Tensor | None = None) -> SparseCodes:
        """:meth:`select` for a training step; of latents over ranks those that win among all."""
        if context.ranks is None:
            return super().select_in(context, W_enc)

        W, by = self.W_enc if W_enc is None else W_enc, self.config.by_magnitude
        scale = self.rank_scale()

        def largest(
            x: torch.Tensor, n: int, floor: torch.Tensor | None = None
        ) -> tuple[SparseCodes, torch.Tensor]:
            ranked_by = (scale, None, by, floor)
            found = select_topk(x, W, self.b_enc, n, *ranked_by, backend=self.backend)
            preacts = SparseCodes(*found, len(W))
            return preacts, self._keys(preacts)

        k = int(self.kept_per_token(context.k, context.objective))
        return context.ranks.top(largest, context.x, k)

    def _keys(self, preacts: SparseCodes) -> torch.Tensor:
        """What ranks the entries, like their values."""
        keys, scale = preacts.values.detach(), self.rank_scale()
        if scale is not None:
            keys = keys * scale[preacts.indices.long()]
        return keys.abs() if self.config.by_magnitude else keys

    def activate(self, preacts: SparseCodes) -> SparseCodes:
        """ReLU, or the pre-activations themselves with ``relu="none"``."""
        return super().activate(preacts) if self.drops_zeros else preacts

    @property
    def drops_zeros(self) -> bool:
        """Whether an entry of value 0 counts as dropped: with a ReLU."""
        return self.config.relu != "none"

    def check_objective(self, objective: ObjectiveConfig) -> None:
        """Checks the objective's class, and that multi-TopK and prefixes are not combined."""
        super().check_objective(objective)
        assert isinstance(objective, TopKObjective)
        if objective.multi_topk and (objective.random_prefixes or self.config.groups):
            raise ValueError("multi_topk: expected false with prefixes of latents, got true")
        spread = len(self.latents) < self.config.n_latents
        if objective.multi_topk and spread and not self.drops_zeros:
            raise ValueError("multi_topk: expected false with relu 'none' over ranks, got true")

    def kept_per_token(self, k: float, objective: TopKObjective) -> float:
        """Latents selected per token: k, or 4 k for multi-TopK."""
        return min(_MULTI * k, self.config.n_latents) if objective.multi_topk else k

    def reconstructions(self, preacts: SparseCodes, context: Context) -> list[Reconstruction]:
        """Reconstructions from the k largest latents and, for multi-TopK, the 4 k largest."""
        (whole,) = super().reconstructions(preacts, context)
        if not context.objective.multi_topk:
            return [whole]
        first = self._among_k(preacts, context)
        main = whole._replace(values=torch.where(first, whole.values, 0))
        return [main, whole._replace(weight=_MULTI_WEIGHT)]

    def _among_k(self, preacts: SparseCodes, context: Context) -> torch.Tensor:
        """Which of the 4 k entries are among a token's k largest, like the values or [4 k]."""
        if preacts.offsets is None:  # all latents are here
            return torch.arange(preacts.k, device=preacts.values.device) < context.k
        assert context.ranks is not None
        counts = context.ranks.winners(preacts, self._keys(preacts), int(context.k))
        tokens = preacts.tokens.long()
        place = torch.arange(len(tokens), device=tokens.device) - preacts.offsets[tokens]
        return place < counts[tokens]

    def main_codes(
        self, preacts: SparseCodes, values: torch.Tensor, k: float, objective: TopKObjective
    ) -> SparseCodes:
        """The k largest entries, without multi-TopK's further ones."""
        if not objective.multi_topk or preacts.offsets is not None:
            return preacts.with_values(values)
        first = slice(None), slice(int(k))
        return preacts.with_values(values[first], preacts.indices[first])

    def prefixes(self, objective: TopKObjective, step: int, seed: int) -> Prefixes | None:
        """The prefixes of the configured groups, or random ones drawn for this step."""
        return prefixes_of(self, objective, step, seed)
