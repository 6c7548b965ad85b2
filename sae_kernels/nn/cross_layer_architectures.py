"""Cross-layer transcoders and causal crosscoders with TopK, BatchTopK and JumpReLU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sae_kernels import functional
from sae_kernels.config.base import POSITIVE, POSITIVE_INTEGER, setting
from sae_kernels.config.objective import PrefixObjective
from sae_kernels.nn.batch_topk import BatchTopKConfig, BatchTopKSAE, KeyCut
from sae_kernels.nn.cross_layer import CrossLayer, CrossLayerConfig
from sae_kernels.nn.jumprelu import JumpReLUConfig, JumpReLUObjective, JumpReLUSAE
from sae_kernels.nn.objective import SurveyContext
from sae_kernels.nn.registry import Preset, register
from sae_kernels.nn.topk import TopKConfig, TopKObjective, TopKSAE

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from sae_kernels.codes import SparseCodes
    from sae_kernels.config.sae import Size

_TOGETHER = (
    "keep the largest of all layers' latents together, as many as k of each layer are; else k of "
    "each layer"
)


@dataclasses.dataclass(frozen=True)
class CrossLayerTopKConfig(CrossLayerConfig, TopKConfig):
    """Settings of a TopK cross-layer transcoder or causal crosscoder.

    Example:
        >>> CrossLayerTopKConfig(768, 12 * 24576, n_layers=12, d_out=768).writers[:2]
        (24576, 49152)
    """

    architecture: ClassVar[str] = "cross_layer_topk"

    k: int = setting(32, "latents kept per token and layer that is read", POSITIVE_INTEGER)
    layers_together: bool = setting(False, _TOGETHER)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_most_layer_latents("k")


@dataclasses.dataclass(frozen=True)
class CrossLayerTopKObjective(TopKObjective):
    """Training objective of a TopK cross-layer architecture, without AuxK."""

    auxk_alpha: float = 0.0


@register
class CrossLayerTopK(CrossLayer, TopKSAE):
    """TopK cross-layer transcoder or causal crosscoder.

    Weights and formula: :class:`~sae_kernels.nn.CrossLayer`. Codes have k entries for each layer
    that is read, the first layer's first; or, of all layers together, the largest first.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import CrossLayerTopK
        >>> clt = CrossLayerTopK(8, 3 * 32, n_layers=3, d_out=8, k=4)
        >>> output = clt(torch.randn(5, 3 * 8))
        >>> output.x_hat.shape, output.codes.indices.shape, clt.W_dec.shape
        (torch.Size([5, 24]), torch.Size([5, 12]), torch.Size([192, 8]))
    """

    config: CrossLayerTopKConfig
    config_class = CrossLayerTopKConfig
    spreads: ClassVar[bool] = False
    objective_class = CrossLayerTopKObjective
    keeps_fixed_number: ClassVar[bool] = False  # of rows of W_dec
    presets: ClassVar[dict[str, Preset]] = {
        "topk_clt": Preset("TopK transcoder across layers", data="targets"),
        "causal_crosscoder": Preset(
            "TopK crosscoder whose latents read one layer and write to it and those after it",
            data="layers",
        ),
    }

    def select(
        self, x_centred: torch.Tensor, *, W_enc: torch.Tensor | None = None, k: float | None = None
    ) -> SparseCodes:
        """The k largest pre-activations of each layer, or as many of all layers together."""
        config, scale = self.config, self.rank_scale()
        k = int(config.k if k is None else k)
        total = k * config.n_sources
        each = min(total, config.layer_latents) if config.layers_together else k

        def encode(
            x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None
        ) -> SparseCodes:
            return functional.encode_topk(
                x,
                W,
                b,
                each,
                relu=False,
                rank_scale=scale,
                by_magnitude=config.by_magnitude,
                compute_dtype=self.compute_dtype,
                backend=self.backend,
            )

        codes = self.by_layer(encode, x_centred, W_enc, scale)
        if not config.layers_together:
            return codes
        keys = self._keys(codes) + 0.0  # -0 becomes +0
        order = keys.sort(dim=-1, descending=True, stable=True).indices[..., :total]
        return codes.with_values(codes.values.gather(-1, order), codes.indices.gather(-1, order))


@dataclasses.dataclass(frozen=True)
class CrossLayerBatchTopKConfig(CrossLayerConfig, BatchTopKConfig):
    """Settings of a BatchTopK cross-layer transcoder or causal crosscoder.

    Example:
        >>> CrossLayerBatchTopKConfig(8, 96, n_layers=3, d_out=8, k=4.5).layer_latents
        32
    """

    architecture: ClassVar[str] = "cross_layer_batchtopk"

    k: float = setting(
        32, "latents kept per token and layer that is read, on average; may be a fraction", POSITIVE
    )
    layers_together: bool = setting(True, _TOGETHER)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_most_layer_latents("k")

    def shapes(self) -> dict[str, Size]:
        """Shapes of the weights and of the inference threshold: one, or one for each layer read."""
        return {**super().shapes(), "threshold": () if self.layers_together else (self.n_sources,)}


@dataclasses.dataclass(frozen=True)
class CrossLayerBatchTopKObjective(PrefixObjective):
    """Training objective of a BatchTopK cross-layer architecture, without AuxK."""

    auxk_alpha: float = 0.0


@register
class CrossLayerBatchTopK(CrossLayer, BatchTopKSAE):
    """BatchTopK cross-layer transcoder or causal crosscoder.

    Weights and formula: :class:`~sae_kernels.nn.CrossLayer`. In training the largest positive
    pre-activations of a batch are kept, ``int(k n B)`` of all n layers that are read, or
    ``int(k B)`` of each.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import CrossLayerBatchTopK
        >>> clt = CrossLayerBatchTopK(8, 3 * 32, n_layers=3, d_out=8, k=2.5)
        >>> clt.encode(torch.randn(20, 3 * 8)).values.shape
        torch.Size([150])
    """

    config: CrossLayerBatchTopKConfig
    config_class = CrossLayerBatchTopKConfig
    spreads: ClassVar[bool] = False
    objective_class = CrossLayerBatchTopKObjective
    presets: ClassVar[dict[str, Preset]] = {
        "batchtopk_clt": Preset(
            "BatchTopK transcoder across layers",
            sae={"rank_by_decoder_norm": True},
            data="targets",
        ),
    }

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name in () if self.config.layers_together else ("threshold", "last_key"):
            self._buffers[name] = getattr(self, name).repeat(self.config.n_sources)

    def thresholds(self) -> torch.Tensor:
        """One threshold for all latents, or that of its layer for each, [F]."""
        if self.config.layers_together:
            return self.threshold
        return self.threshold.repeat_interleave(self.config.layer_latents)

    def select(
        self, x_centred: torch.Tensor, *, W_enc: torch.Tensor | None = None, k: float | None = None
    ) -> SparseCodes:
        """The largest pre-activations of the batch; in evaluation those above the threshold."""
        if not self.training:
            return super().select(x_centred, W_enc=W_enc)
        k = self.config.k if k is None else k
        if not self.config.layers_together:
            return self._select_alone(x_centred, W_enc, k)
        rows = x_centred.reshape(-1, x_centred.shape[-1])
        cut: KeyCut = self.survey([rows], SurveyContext(None, len(rows), k, W_enc))
        codes = cut.cut(cut.found.pop(), self.rank_scale())
        return dataclasses.replace(codes, leading=tuple(x_centred.shape[:-1]))

    def _select_alone(
        self, x_centred: torch.Tensor, W_enc: torch.Tensor | None, k: float
    ) -> SparseCodes:
        """The int(k B) largest of each layer, among them as many as all layers keep together."""
        last_keys = None if self.config.layers_together else self.last_key

        def encode(
            x: torch.Tensor,
            W: torch.Tensor,
            b: torch.Tensor,
            scale: torch.Tensor | None,
            last_key: torch.Tensor | None,
        ) -> SparseCodes:
            codes = functional.encode_batch_topk(
                x,
                W,
                b,
                k,
                rank_scale=scale,
                start=None if last_key is None else last_key[0],
                compute_dtype=self.compute_dtype,
                backend=self.backend,
            )
            if last_key is not None:
                self._note(codes, scale, last_key[0])
            return codes

        codes = self.by_layer(encode, x_centred, W_enc, self.rank_scale(), last_keys)
        if last_keys is None:
            self._note(codes, self.rank_scale(), self.last_key)
        return codes

    def survey(self, micro_batches: Iterable[torch.Tensor], context: SurveyContext) -> Any:
        """Finds the smallest key that the whole batch keeps, by encoding every token.

        Raises:
            ValueError: each layer has a batch of its own.
        """
        if not self.config.layers_together:
            raise ValueError(
                "micro_batch_size: expected None with layers_together false, whose smallest kept "
                "keys are each layer's; set layers_together, or train on whole batches"
            )
        return super().survey(micro_batches, context._replace(k=context.k * self.config.n_sources))


@dataclasses.dataclass(frozen=True)
class CrossLayerJumpReLUConfig(CrossLayerConfig, JumpReLUConfig):
    """Settings of a JumpReLU cross-layer transcoder or causal crosscoder.

    Example:
        >>> CrossLayerJumpReLUConfig(8, 96, n_layers=3, d_out=8).n_sources
        3
    """

    architecture: ClassVar[str] = "cross_layer_jumprelu"


@dataclasses.dataclass(frozen=True)
class CrossLayerJumpReLUObjective(JumpReLUObjective):
    """Training objective of a JumpReLU cross-layer architecture: tanh penalty, pre-activation loss.

    Example:
        >>> CrossLayerJumpReLUObjective().sparsity
        'tanh'
    """

    loss: Literal["fvu", "mse"] = "mse"
    sparsity: str = "tanh"
    sparsity_coefficient: float = 0.1
    sparsity_norm_weighted: bool = True
    target_l0: float | None = None
    preact_coefficient: float = 3e-6


@register
class CrossLayerJumpReLU(CrossLayer, JumpReLUSAE):
    """JumpReLU cross-layer transcoder or causal crosscoder (Ameisen et al., March 2025).

    Weights and formula: :class:`~sae_kernels.nn.CrossLayer`. The default penalty is
    ``sum_f tanh(c f |all rows of f|)``; with ``decoder_norm="sum"`` and sparsity l1 it is the sum
    over pairs of a latent and a layer of ``f |row of f at l|`` (Lindsey et al., October 2024).

    Example:
        >>> import torch
        >>> from sae_kernels.nn import CrossLayerJumpReLU
        >>> clt = CrossLayerJumpReLU(8, 3 * 32, n_layers=3, d_out=8, threshold_init=0.5).eval()
        >>> bool((clt.encode(torch.randn(5, 3 * 8)).values > 0.5).all())
        True
    """

    config: CrossLayerJumpReLUConfig
    config_class = CrossLayerJumpReLUConfig
    spreads: ClassVar[bool] = False
    objective_class = CrossLayerJumpReLUObjective
    presets: ClassVar[dict[str, Preset]] = {
        "clt": Preset(
            "JumpReLU transcoder across layers, with a tanh penalty",
            # Where pre-activations have unit variance: few fire before any is trained.
            sae={"threshold_init": 2.0, "bandwidth": 1.0},
            data="targets",
        ),
    }
