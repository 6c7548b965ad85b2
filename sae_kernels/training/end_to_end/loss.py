"""The end-to-end loss: an SAE's effect on its model (Braun et al., arXiv 2405.12241)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.harvest.language_model import divergence, log_probabilities
from sae_kernels.harvest.model import input_device
from sae_kernels.harvest.norms import recorded_max_norm
from sae_kernels.harvest.splice import clean_logits, frozen, record, spliced_logits
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.step import StepBase
from sae_kernels.training.end_to_end.spliced import SplicedSAE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from sae_kernels.config.objective import ObjectiveConfig
    from sae_kernels.nn import SparseAutoencoder

_COEFFICIENTS = ("kl_coefficient", "downstream_coefficient", "reconstruction_coefficient")


@dataclasses.dataclass(frozen=True)
class EndToEnd:
    """Coefficients and downstream layers of the end-to-end loss.

    Attributes:
        kl_coefficient: weight of ``KL(clean || spliced)`` of the next-token distributions.
        downstream_coefficient: weight of the mean of the downstream layers' errors.
        reconstruction_coefficient: weight of the FVU at the spliced layer.
        downstream_layers: dotted paths of later layers whose output the SAE should preserve.

    Raises:
        ValueError: a coefficient that is negative or not finite, none above 0, a layer named twice.

    Example:
        >>> EndToEnd(downstream_layers=("h.7", "h.8")).downstream_coefficient
        1.0
    """

    kl_coefficient: float = 1.0
    downstream_coefficient: float = 1.0
    reconstruction_coefficient: float = 0.0
    downstream_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "downstream_layers", tuple(self.downstream_layers))
        for name in _COEFFICIENTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)!r}")
        downstream = self.downstream_coefficient if self.downstream_layers else 0
        if not self.kl_coefficient + downstream + self.reconstruction_coefficient:
            raise ValueError(
                "expected a coefficient above 0 (downstream_coefficient counts with "
                f"downstream_layers only), got {self}"
            )
        if len(set(self.downstream_layers)) != len(self.downstream_layers):
            raise ValueError(f"downstream_layers: expected each once, got {self.downstream_layers}")


class EndToEndLoss(NamedTuple):
    """The end-to-end loss and its parts, scalars.

    Attributes:
        loss: the loss to minimise; gradients reach the SAE.
        kl: nats per attended token.
        downstream: mean over the downstream layers of their FVU; 0 where there are none.
        fvu: at the spliced layer.
        l0: latents per token that fired.
        sparsity: the sparsity penalty, with its coefficient.
        aux_loss: the AuxK loss, with its coefficient.
    """

    loss: Tensor
    kl: Tensor
    downstream: Tensor
    fvu: Tensor
    l0: Tensor
    sparsity: Tensor
    aux_loss: Tensor


def end_to_end_loss(
    model: nn.Module,
    inputs: TokenBatch | Tensor | Mapping[str, Tensor],
    layer: str,
    sae: SparseAutoencoder,
    weights: EndToEnd | None = None,
    *,
    step: StepBase | None = None,
    k: float | None = None,
) -> EndToEndLoss:
    """The end-to-end loss of an SAE that replaces a layer's output; the model gets no gradient.

    ``u (kl_coefficient * mean_t KL(clean_t || spliced_t)
    + downstream_coefficient / n * sum_l |a_l' - a_l|^2 / |a_l - mean(a_l)|^2
    + reconstruction_coefficient * |x_hat - x|^2 / |x - mean(x)|^2
    + |x_gate - x|^2 / |x - mean(x)|^2) + penalty + AuxK``

    t runs over the attended tokens, l over the n downstream layers, whose output is a_l clean and
    a_l' spliced; norms and means are over the attended tokens, at the splice over the replaced
    ones. x_gate is what a Gated SAE's gate reconstructs by itself. Prefixes and multi-TopK's 4k
    codes reconstruct x besides, under the third coefficient. u is 1 or, with the setting
    ``loss = "mse"``, the variance of x per token, so that a penalty weighs what it does in
    :func:`~sae_kernels.training.train`; both are of x in the scale of training.

    The terms are those of Braun et al. (arXiv 2405.12241) with their squared errors divided by the
    layer's variance, so that one coefficient fits all layers.

    Args:
        model: a causal model, see :func:`~sae_kernels.harvest.load_causal_model`.
        inputs: token ids [B, S], or ids and attention mask; a
            :class:`~sae_kernels.harvest.TokenBatch` says which of them are replaced. Activations
            above the bound in ``sae.metadata["activations"]["max_norm"]`` are not.
        layer: the dotted path of the layer that the SAE reconstructs.
        sae: on the layer's device.
        weights: coefficients and downstream layers; default: KL alone.
        step: the SAE's training step, which holds objective, penalty schedule and dead latents;
            default: a fresh one without penalty.
        k: replaces the configuration's k.

    Raises:
        ModelError: no such layer, one without an output [B, S, D], or a model without logits.
        ValueError: no model; a layer of another width than the SAE; a downstream layer that does
            not come after the spliced one; settings that do not go together.
    """
    require_model(model)
    if step is None:
        step = StepBase(sae, sae.objective_class(sparsity="none", loss="fvu"))
        step.restore_()  # nothing is trained: the SAE keeps its own compute dtype
    weights = weights or EndToEnd()
    check_end_to_end(sae, step.objective, weights)
    spliced = SplicedSAE(step, layer, weights, k)
    return measured_loss(model, TokenBatch.of(inputs), spliced)


def measured_loss(model: nn.Module, batch: TokenBatch, spliced: SplicedSAE) -> EndToEndLoss:
    """:func:`end_to_end_loss` of a :class:`SplicedSAE`, which keeps its own measures."""
    layer, weights = spliced.layer, spliced.weights
    batch = batch.to(input_device(model))
    mask = batch.attention_mask
    with frozen(model), record(model, (layer, *weights.downstream_layers)) as outputs:
        with torch.no_grad():
            clean = log_probabilities(clean_logits(model, batch)[mask])
        before = downstream_outputs(outputs, layer, weights)
        outputs.clear()
        max_norm = recorded_max_norm(spliced.sae.metadata)
        logits = spliced_logits(model, batch, layer, spliced, max_norm=max_norm)
        after = downstream_outputs(outputs, layer, weights)
    here = spliced.measured
    if here is None:
        raise ValueError("expected at least one token to replace, got none")
    kl = divergence(clean, log_probabilities(logits[mask])).mean()
    # Of a model on several devices every layer's output is on its own.
    errors = [
        _fvu(a[mask.to(a.device)], b[mask.to(b.device)]).to(kl.device)
        for a, b in zip(after, before, strict=True)
    ]
    downstream = torch.stack(errors).mean() if errors else torch.zeros_like(kl)
    loss = here.loss
    for weight, term in (
        (weights.kl_coefficient, kl),
        (weights.downstream_coefficient, downstream),
    ):
        loss = loss + weight * here.unit * term.to(loss.device) if weight else loss
    return EndToEndLoss(
        loss, kl.detach(), downstream.detach(), here.fvu, here.l0, here.sparsity, here.aux_loss
    )


def check_end_to_end(sae: SparseAutoencoder, objective: ObjectiveConfig, weights: EndToEnd) -> None:
    """Raises ValueError for settings that do not go together."""
    sae.check_objective(objective)
    several = sae.kept_per_token(1, objective) > 1 or sae.prefixes(objective, 0, 0) is not None
    if several and not weights.reconstruction_coefficient:
        raise ValueError(
            "reconstruction_coefficient: expected a number above 0 with groups, random_prefixes or "
            "multi_topk, whose further reconstructions are of the layer alone (the model sees the "
            "main one), got 0"
        )
    if sae.rows_to_finish(objective):
        raise ValueError(
            "fix_shrinkage: expected false end to end (it fits stored activations), got true"
        )


def require_model(model: object) -> None:
    """Raises ValueError for an object that is no model."""
    if not callable(getattr(model, "parameters", None)):
        raise ValueError(
            f"the end-to-end loss needs the model that the SAE sits in, got {model!r}; load it "
            "with sae_kernels.harvest.load_causal_model"
        )


def _fvu(a: Tensor, b: Tensor) -> Tensor:
    """FVU ``|a - b|^2 / |b - mean(b)|^2`` of rows [n, D], in fp32 at least."""
    dtype = torch.promote_types(b.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    return (a - b).square().sum() / (b - b.mean(0)).square().sum()


def downstream_outputs(outputs: dict[str, Tensor], layer: str, weights: EndToEnd) -> list[Tensor]:
    """The downstream layers' outputs; raises ValueError unless they ran after ``layer``."""
    ran = list(outputs)
    for name in weights.downstream_layers:
        if name not in ran or ran.index(name) <= ran.index(layer):
            raise ValueError(
                f"downstream_layers: expected layers that run after {layer}, got {name}"
            )
    return [outputs[name] for name in weights.downstream_layers]
