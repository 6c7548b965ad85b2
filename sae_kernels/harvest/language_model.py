"""The effect of an SAE on its language model: next-token loss with reconstructions spliced in."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_kernels.harvest.model import input_device
from sae_kernels.harvest.norms import NormBound, recorded_max_norm
from sae_kernels.harvest.splice import (
    apply_sae,
    clean_logits,
    frozen,
    replaced_rows,
    spliced_logits,
)
from sae_kernels.harvest.spread import spread
from sae_kernels.harvest.tokens import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class LanguageModelLoss:
    """Next-token cross entropies in nats per token, with and without an SAE in the model.

    Attributes:
        n_predictions: the number of predicted tokens.
        clean_loss: of the unchanged model.
        spliced_loss: with the layer's output replaced by its reconstruction.
        zero_loss: with the layer's output set to zero.
        mean_loss: with the layer's output set to its mean over these tokens.
        kl: ``KL(clean || spliced)`` of the predicted distributions, nats per token.

    Example:
        >>> loss = LanguageModelLoss(
        ...     1000, clean_loss=3.0, spliced_loss=3.5, zero_loss=8.0, mean_loss=7.0, kl=0.4
        ... )
        >>> loss.loss_recovered, loss.loss_recovered_from_mean
        (0.9, 0.875)
    """

    n_predictions: int
    clean_loss: float
    spliced_loss: float
    zero_loss: float
    mean_loss: float
    kl: float

    @property
    def loss_recovered(self) -> float:
        """Loss recovered against zeros: ``(zero_loss - spliced_loss) / (zero_loss - clean_loss)``.

        1 for a perfect reconstruction, 0 for one that is no better than zeros; NaN where zeros do
        not change the loss.
        """
        return self._recovered(self.zero_loss)

    @property
    def loss_recovered_from_mean(self) -> float:
        """``(mean_loss - spliced_loss) / (mean_loss - clean_loss)``, see :attr:`loss_recovered`."""
        return self._recovered(self.mean_loss)

    def _recovered(self, ablated: float) -> float:
        lost = ablated - self.clean_loss
        return (ablated - self.spliced_loss) / lost if lost else math.nan

    def scalars(self) -> dict[str, float]:
        """All losses and derived scores by name, for JSON."""
        return {
            **dataclasses.asdict(self),
            "loss_recovered": self.loss_recovered,
            "loss_recovered_from_mean": self.loss_recovered_from_mean,
        }


def language_model_loss(
    model: nn.Module,
    batches: Iterable[TokenBatch | Tensor | Mapping[str, Tensor]],
    layer: str,
    sae: Callable[[Tensor], Any],
    *,
    max_norm: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> LanguageModelLoss:
    """Measures next-token loss: clean, with the SAE spliced in, and with the layer ablated.

    Every token with an attended token before it is predicted. The layer's output is replaced at
    the batches' positions, in its own dtype: by reconstructions, by zeros, by its mean there.

    Args:
        model: a causal model, see :func:`load_causal_model`; its mode and gradients are restored.
        batches: from :func:`token_batches`, or token ids [B, S]. Their ids are kept for a second
            pass, which measures the mean ablation.
        layer: the dotted path of the module whose output the SAE reconstructs.
        sae: maps activations [n, D] on the layer's device to an ``SAEOutput``; put in evaluation
            mode during the call.
        max_norm: keep activations of a larger norm as they are, which an SAE was not trained on:
            ``sae.metadata["activations"]["max_norm"]`` tells, for one trained here.
        progress: called with 1 after each batch of either pass, as `tqdm.update` expects.

    Raises:
        ModelError: an unknown layer, one with another output, or a model without logits.
        ValueError: a layer of another width than the SAE, or no token to predict.
    """
    kept: list[TokenBatch] = []
    meter = _Meter(model, layer, max_norm)
    still = frozen(sae) if isinstance(sae, nn.Module) else nullcontext()
    with frozen(model), still, torch.inference_mode():
        for inputs in batches:
            kept.append(TokenBatch.of(inputs))
            meter.first_pass(kept[-1], sae)
            if progress is not None:
                progress(1)
        if not meter.n_predictions:
            raise ValueError("expected at least one token with another before it, got none")
        for batch in kept:
            meter.second_pass(batch)
            if progress is not None:
                progress(1)
    return meter.result()


def norm_bound(
    model: nn.Module, batches: Sequence[TokenBatch], layer: str, multiple: float | None
) -> float | None:
    """So many times the median norm of a layer's output at the positions to replace.

    The median is that of about 16384 tokens, in batches spread evenly over the given ones. None for
    no multiple, and where the output is zero.

    Raises:
        ModelError: an unknown layer, or one with another output.
    """
    chosen = spread(batches, lambda batch: int(batch.replaced.sum()), 16384, seed=0)
    rows = torch.cat(list(replaced_rows(model, chosen, layer)))
    norms = NormBound(multiple, [rows.shape[1]])
    norms.kept(rows)
    return recorded_max_norm({"activations": {"max_norm": norms.recorded()}})


class _Meter:
    """Accumulates losses and KL over the predicted tokens, in fp64."""

    def __init__(self, model: nn.Module, layer: str, max_norm: float | None) -> None:
        self.model, self.layer, self.max_norm = model, layer, max_norm
        self.device = input_device(model)
        self.n_predictions = self.n_rows = 0
        self.losses = dict.fromkeys(("clean_loss", "spliced_loss", "zero_loss", "mean_loss"), 0.0)
        self.kl = 0.0
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)

    def first_pass(self, batch: TokenBatch, sae: Callable[[Tensor], Any]) -> None:
        def reconstruct(x: Tensor) -> Tensor:
            self.total = self.total + x.sum(0, dtype=torch.float64).to(self.device)
            self.n_rows += len(x)
            x_hat: Tensor = apply_sae(sae, x, self.layer).x_hat
            return x_hat

        batch = batch.to(self.device)
        self._add("zero_loss", self._spliced(batch, torch.zeros_like), batch)
        clean = _log_predictions(clean_logits(self.model, batch), batch)
        spliced = self._spliced(batch, reconstruct)
        self._add("clean_loss", clean, batch)
        self._add("spliced_loss", spliced, batch)
        self.kl += float(divergence(clean, spliced).sum(dtype=torch.float64))
        self.n_predictions += len(clean)

    def second_pass(self, batch: TokenBatch) -> None:
        mean = self.total / max(self.n_rows, 1)
        batch = batch.to(self.device)
        self._add(
            "mean_loss", self._spliced(batch, lambda x: mean.to(x.device).expand(x.shape)), batch
        )

    def result(self) -> LanguageModelLoss:
        n = self.n_predictions
        losses = {name: total / n for name, total in self.losses.items()}
        return LanguageModelLoss(n, kl=self.kl / n, **losses)

    def _spliced(self, batch: TokenBatch, replace: Callable[[Tensor], Tensor]) -> Tensor:
        logits = spliced_logits(self.model, batch, self.layer, replace, max_norm=self.max_norm)
        return _log_predictions(logits, batch)

    def _add(self, name: str, log_predictions: Tensor, batch: TokenBatch) -> None:
        tokens = batch.input_ids[:, 1:][_predicted(batch)]
        chosen = log_predictions.gather(1, tokens[:, None])
        self.losses[name] -= float(chosen.sum(dtype=torch.float64))


def _predicted(batch: TokenBatch) -> Tensor:
    """Mask [B, S - 1] of the tokens from the second on that have an attended one before them."""
    return batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]


def _log_predictions(logits: Tensor, batch: TokenBatch) -> Tensor:
    """Log probabilities [n, V] at the positions that predict, in fp32 or fp64."""
    return log_probabilities(logits[:, :-1][_predicted(batch)])


def log_probabilities(logits: Tensor) -> Tensor:
    """``log softmax`` over the last dimension, in fp32 (fp64 for fp64 logits)."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` [...] in nats, from log probabilities [..., V].

    >>> p = torch.tensor([0.5, 0.5])
    >>> round(float(divergence(p.log(), torch.tensor([0.25, 0.75]).log())), 4)
    0.1438
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)
