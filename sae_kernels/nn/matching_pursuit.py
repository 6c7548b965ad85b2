"""Matching pursuit SAEs: latents chosen one after the other on what is left of a token."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.config.base import NOT_NEGATIVE, POSITIVE_INTEGER, setting
from sae_kernels.config.objective import ObjectiveConfig
from sae_kernels.config.sae import SAEConfig, Size
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.registry import register

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class MatchingPursuitConfig(SAEConfig):
    """Settings of a matching pursuit SAE (Costa et al., arXiv 2506.03093).

    Example:
        >>> sorted(MatchingPursuitConfig(768, 24576, k=32).shapes())
        ['W_dec', 'b_dec']
    """

    architecture: ClassVar[str] = "matching_pursuit"

    k: int = setting(32, "most latents chosen per token, one product each", POSITIVE_INTEGER)
    residual_threshold: float = setting(
        0.0,
        "norm of what is left of a token below which no further latent is chosen, in the scale of "
        "training (SAELens: 0.01); 0 is off",
        NOT_NEGATIVE,
    )
    stop_on_repeat: bool = setting(
        True,
        "choose no further latent once one was chosen again (SAELens' stop_on_duplicate_support); "
        "what it adds is counted",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A transcoder, or a skip connection, would not subtract it.
        self.expect("subtract_b_dec", self.subtract_b_dec, "true with matching pursuit")
        self.expect("n_layers", self.n_layers == 1, "1 with matching pursuit")

    def shapes(self) -> dict[str, Size]:
        """Shapes of the decoder and its bias: the encoder is the decoder, without a bias."""
        whole = super().shapes()
        return {name: whole[name] for name in ("W_dec", "b_dec")}


@dataclasses.dataclass(frozen=True)
class MatchingPursuitObjective(ObjectiveConfig):
    """Training objective of a matching pursuit SAE, without AuxK."""

    auxk_alpha: float = 0.0


@register
class MatchingPursuitSAE(SparseAutoencoder):
    """Matching pursuit SAE (Costa et al., arXiv 2506.03093; SAELens' ``matching_pursuit``).

    From ``r = x - b_dec``, k times: the latent f of the largest ``<r, W_dec[f]>`` is chosen, with
    ``c = relu(<r, W_dec[f]>)`` added to its code, and ``r = r - c W_dec[f]``. So latents of a
    token are conditioned on those before, and each costs a product with all of W_dec.

    Gradients go through all steps to W_dec and b_dec, with AutogradStep: FusedStep differentiates
    one product. There is no W_enc but W_dec, and no b_enc.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import MatchingPursuitSAE
        >>> sae = MatchingPursuitSAE(8, 32, k=4)
        >>> output = sae(torch.randn(5, 8))
        >>> output.x_hat.shape, output.codes.indices.shape[0]
        (torch.Size([5, 8]), 5)
    """

    config: MatchingPursuitConfig
    config_class = MatchingPursuitConfig
    objective_class = MatchingPursuitObjective
    encodes_once: ClassVar[bool] = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        del self._parameters["W_enc"]
        self._parameters["b_enc"] = None

    @property
    def W_enc(self) -> torch.Tensor:  # type: ignore[override]
        """W_dec, which encodes too."""
        return self.W_dec

    def check_objective(self, objective: ObjectiveConfig) -> None:
        """Checks the objective's class, and that AuxK, which needs an encoder, is off."""
        super().check_objective(objective)
        if objective.auxk_alpha:
            raise ValueError(
                f"auxk_alpha: expected 0 with matching pursuit, got {objective.auxk_alpha}"
            )

    def select(
        self, x_centred: torch.Tensor, *, W_enc: torch.Tensor | None = None, k: float | None = None
    ) -> SparseCodes:
        """The chosen latents in their order, with their codes; a repeated one's are added up.

        There are as many entries a token as the longest has, k inside of torch.compile.
        """
        config = self.config
        W = self.W_dec if W_enc is None else W_enc
        options: dict[str, Any] = {"compute_dtype": self.compute_dtype, "backend": self.backend}
        left = x_centred.reshape(-1, x_centred.shape[-1])
        done = torch.zeros(len(left), 1, dtype=torch.bool, device=left.device)
        indices, values = done.new_empty(len(left), 0, dtype=torch.int32), left.new_empty(0, 0)
        for chosen in range(int(config.k if k is None else k)):
            best = functional.encode_topk(left, W, None, 1, narrow=self.narrow, **options)
            value = torch.where(done, 0, best.values)
            left = left - functional.decode(best.with_values(value), W, **options)
            before = values if chosen else value[:, :0]
            again = (indices == best.indices) & (before > 0) & (value > 0)
            repeats = again.any(1, keepdim=True)
            values = torch.cat([before + again * value, torch.where(repeats, 0, value)], 1)
            indices = torch.cat([indices, best.indices], 1)
            done = done | (value <= 0)  # nothing that is left has a positive product
            if config.stop_on_repeat:
                done = done | repeats
            if config.residual_threshold:
                done = done | (left.detach().norm(dim=1, keepdim=True) < config.residual_threshold)
            if not torch.compiler.is_compiling() and done.all():
                break
        shape = (*x_centred.shape[:-1], values.shape[1])
        return SparseCodes(values.reshape(shape), indices.reshape(shape), config.n_latents)

    def encode_latents(
        self, x: torch.Tensor, latents: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """The codes of some latents; others are chosen before them, so all are computed."""
        return self.encode(x).columns(latents)

    def fold_b_dec_(self) -> None:
        """Nothing: b_dec is subtracted once, before all products."""

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """Divides the threshold of what is left by the scale."""
        threshold = self.config.residual_threshold / scale
        self.config = dataclasses.replace(self.config, residual_threshold=threshold)
