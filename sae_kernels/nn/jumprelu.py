"""JumpReLU SAEs: every latent above its own learned threshold."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from sae_kernels import functional
from sae_kernels.config.base import NOT_NEGATIVE, POSITIVE, setting
from sae_kernels.config.objective import PrefixObjective
from sae_kernels.config.sae import SAEConfig, Size
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.initialise import bounds_at, scale_encoder_
from sae_kernels.nn.objective import NESTED, check_groups, prefixes_of
from sae_kernels.nn.registry import Preset, register

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Context, Prefixes, Reconstruction, SurveyContext
    from sae_kernels.step.ranks import Ranks

_LEAST = 1e-3  # initial threshold: one that is not positive has no logarithm


@dataclasses.dataclass(frozen=True)
class JumpReLUConfig(SAEConfig):
    """Settings of a JumpReLU SAE (Rajamanoharan et al., arXiv 2407.14435).

    Example:
        >>> JumpReLUConfig(768, 24576, bandwidth=0.1).threshold_name
        'log_threshold'
    """

    architecture: ClassVar[str] = "jumprelu"

    threshold_init: float | None = setting(
        None,
        "initial threshold of every latent, in the scale of training; None starts each where a "
        "sample of the activations has target_l0 latents per token (1 without a sample)",
    )
    bandwidth: float = setting(
        0.5,
        "width of the straight-through estimator's rectangle around the threshold, in the scale of "
        "training, where thresholds start near 1 (the paper, SAELens: 0.05 or less)",
        POSITIVE,
    )
    log_threshold: bool = setting(
        True,
        "train the logarithms of the thresholds (the paper, Gemma Scope) or the thresholds "
        "themselves (dictionary_learning, SAELens); fp32 either way",
    )
    groups: tuple[int, ...] | None = setting(
        None,
        "sizes of the latent groups of a Matryoshka SAE (arXiv 2503.17547); None: not Matryoshka",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.groups, self.n_latents)
        start = 1.0 if self.threshold_init is None else self.threshold_init
        if self.log_threshold:
            what = "a positive number (log_threshold needs its logarithm)"
            self.expect("threshold_init", start > 0, what)
        self.expect("threshold_init", start >= 0, "a number of at least 0")

    @property
    def threshold_name(self) -> str:
        """Name of the parameter that holds the thresholds."""
        return "log_threshold" if self.log_threshold else "threshold"

    def shapes(self) -> dict[str, Size]:
        """Shapes of the weights and of the thresholds."""
        return {**super().shapes(), self.threshold_name: (self.n_latents,)}


@dataclasses.dataclass(frozen=True)
class JumpReLUObjective(PrefixObjective):
    """Training objective of a JumpReLU SAE; by default a penalty holds L0 at a target.

    Example:
        >>> JumpReLUObjective(target_l0=20.0).sparsity
        'target_l0'
    """

    sparsity: str = setting(
        "target_l0",
        "sparsity penalty per token: none; l1, the sum of the codes; lp, the sum of their p-th "
        "powers, p falling from 1 (p-annealing, arXiv 2408.00113); l0, the number of firing "
        "latents, and target_l0, (L0 / target_l0 - 1)^2, both through JumpReLU's straight-through "
        "estimator; tanh, the sum of tanh(tanh_scale * code)",
        choices=("none", "l1", "lp", "l0", "target_l0", "tanh"),
    )
    sparsity_coefficient: float = 1.0
    target_l0: float | None = 32.0
    auxk_alpha: float = 0.0
    preact_coefficient: float = setting(
        0.0,
        "weight of the pre-activation loss that revives dead latents, relu(threshold - h) times "
        "the decoder norm (3e-6: Anthropic, January 2025); 0 is off",
        NOT_NEGATIVE,
    )


@register
class JumpReLUSAE(SparseAutoencoder):
    """JumpReLU SAE, ``x_hat = b_dec + W_dec^T (h * 1[h > threshold])`` (arXiv 2407.14435).

    The parameter is ``log_threshold`` or ``threshold`` [F], as the configuration says, in fp32
    whatever the module is cast to; a latent whose threshold is +inf never fires. In training mode
    entries within half the bandwidth below the threshold are among the codes too, with the value 0:
    the threshold learns from them.

    Example:
        >>> from sae_kernels.nn import JumpReLUSAE
        >>> sae = JumpReLUSAE(8, 32, threshold_init=0.5).eval()
        >>> bool((sae.encode(torch.randn(5, 8)).values > 0.5).all())
        True
    """

    config: JumpReLUConfig
    config_class = JumpReLUConfig
    objective_class = JumpReLUObjective
    spreads: ClassVar[bool] = True
    presets: ClassVar[dict[str, Preset]] = {
        "jumprelu": Preset("a learned threshold per latent, L0 held at a target"),
        "matryoshka_jumprelu": Preset(
            "JumpReLU, prefixes of the latents reconstruct alone",
            sae={"groups": NESTED},
            # The last group is in one prefix of five; three fifths of it would soon be dead.
            objective={"auxk_alpha": 1 / 32, "preact_coefficient": 3e-6},
        ),
    }

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        name, start = self.config.threshold_name, self.config.threshold_init
        thresholds = torch.full_like(self.b_enc, 1.0 if start is None else start).float()
        self.register_parameter(name, nn.Parameter(self._trained(thresholds)))
        self.keeps_dtype = (name,)  # type: ignore[misc]

    def _trained(self, thresholds: torch.Tensor) -> torch.Tensor:
        """The parameter that stands for thresholds."""
        return thresholds.log() if self.config.log_threshold else thresholds

    def thresholds(self) -> torch.Tensor:
        """The threshold of each latent, fp32 [F], differentiable; one of +inf stays."""
        parameter = self.get_parameter(self.config.threshold_name)
        if not self.config.log_threshold:
            return parameter
        never = parameter.detach().exp() == torch.inf  # its gradient would be 0 * inf
        return torch.where(never, torch.inf, torch.where(never, 0, parameter).exp())

    def bounds(self) -> torch.Tensor:
        """The thresholds, [F]; in training half a bandwidth below them."""
        below = self.config.bandwidth / 2 if self.training else 0.0
        return self.thresholds().detach() - below

    def activate(self, preacts: SparseCodes) -> SparseCodes:
        """JumpReLU with its straight-through gradient: ``h`` above the threshold, else 0."""
        return functional.jumprelu(
            preacts, self.thresholds(), self.config.bandwidth, backend=self.backend
        )

    @torch.no_grad()
    def start_training_(
        self, x: torch.Tensor, objective: JumpReLUObjective, ranks: Ranks | None = None
    ) -> None:
        """Sets thresholds so that ``target_l0`` latents per token pass them, and scales W_enc.

        Nothing is changed without a ``target_l0``, or where ``threshold_init`` was given.
        """
        if self.config.threshold_init is not None or objective.target_l0 is None:
            return
        bounds = bounds_at(self, x, objective.target_l0).clamp(min=_LEAST)
        bounds *= scale_encoder_(self, x, bounds, ranks)
        self.get_parameter(self.config.threshold_name).copy_(self._trained(bounds))

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """Divides the thresholds by the scale too."""
        super().fold_vectors_(scale, target_scale)
        threshold = self.get_parameter(self.config.threshold_name)
        if self.config.log_threshold:
            threshold.sub_(math.log(scale))
        else:
            threshold.div_(scale)

    def reconstructions(self, preacts: SparseCodes, context: Context) -> list[Reconstruction]:
        """The main reconstruction; entries of value 0 stay, for the thresholds learn from them."""
        (main,) = super().reconstructions(preacts, context)
        return [main._replace(drops_zeros=False)]

    def prefixes(self, objective: JumpReLUObjective, step: int, seed: int) -> Prefixes | None:
        """The prefixes of the configured groups, or random ones drawn for this step."""
        return prefixes_of(self, objective, step, seed)

    def sums_over_entries(self, objective: JumpReLUObjective) -> bool:
        """False with target_l0 or the pre-activation loss, which need sums over the whole batch."""
        nested = self.config.groups or objective.random_prefixes
        whole_batch = objective.sparsity == "target_l0" or objective.preact_coefficient
        return not nested and not whole_batch

    def penalties(
        self, preacts: SparseCodes, parts: list[Reconstruction], context: Context
    ) -> list[torch.Tensor]:
        """The sparsity penalty and the pre-activation loss, if they are on."""
        terms = super().penalties(preacts, parts, context)
        coefficient = context.objective.preact_coefficient
        return [*terms, coefficient * self._preact(preacts, context)] if coefficient else terms

    def sparsity(
        self, preacts: SparseCodes, parts: list[Reconstruction], context: Context
    ) -> torch.Tensor:
        """The penalty: l0 and target_l0 by the straight-through estimator, else as elsewhere."""
        objective = context.objective
        if objective.sparsity not in ("l0", "target_l0"):
            return super().sparsity(preacts, parts, context)
        l0 = context.summed(self._fires(preacts)) / context.batch_tokens
        if objective.sparsity == "l0":
            return l0
        target: float = objective.target_l0
        if context.survey is None:
            return (l0 / target - 1).square()
        # A micro-batch has its share of the batch's penalty, and the slope at the batch's L0.
        off: torch.Tensor = context.survey / target - 1
        share = off.square() * (context.n_tokens / context.batch_tokens)
        return share + 2 * off / target * (l0 - l0.detach())

    def survey(self, micro_batches: Iterable[torch.Tensor], context: SurveyContext) -> Any:
        """Measures the whole batch's L0 for the penalty target_l0, by encoding every token."""
        if context.objective.sparsity != "target_l0":
            return None
        counts = [self._fires(self.select(x, W_enc=context.W_enc)).sum() for x in micro_batches]
        return torch.stack(counts).sum() / context.n_tokens

    def _fires(self, preacts: SparseCodes) -> torch.Tensor:
        """1 for entries above their threshold, else 0; differentiable in the thresholds."""
        return functional.heaviside_ste(
            preacts, self.thresholds(), self.config.bandwidth, backend=self.backend
        )

    def _preact(self, preacts: SparseCodes, context: Context) -> torch.Tensor:
        """``sum_f n_f mean_b relu(threshold_f - h_bf)`` over dead latents, in closed form.

        ``sum_b relu(t - h) = B t - sum_b h + sum_b relu(h - t)``; the last sum is over kept
        entries. A threshold of +inf is meant to silence its latent, which is not revived.
        """
        thresholds = self.thresholds()
        revived = context.dead_mask() & thresholds.isfinite()
        thresholds = torch.where(revived, thresholds, 0)
        weights = torch.where(revived, context.norms.detach().norm(dim=1), 0)
        below = (weights * (context.n_tokens * thresholds - context.preact_sums)).sum()
        entry = functional.gather_by_latent(thresholds, preacts, backend=self.backend)
        over = (preacts.values - entry).relu()
        above = (over * functional.gather_by_latent(weights, preacts, backend=self.backend)).sum()
        return context.summed(below + above) / context.batch_tokens
