"""The training loop through a language model."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import NonFiniteError
from sae_kernels.harvest.splice import check_fits
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.runs.folder import MetricLines, run_folder
from sae_kernels.train import autograd
from sae_kernels.train.compute import compute_dtype
from sae_kernels.train.end_to_end import EndToEnd, check_end_to_end, measured_loss
from sae_kernels.train.objective import k_at
from sae_kernels.train.progress import Progress
from sae_kernels.train.spliced import SplicedSAE
from sae_kernels.train.through_model import layer_width
from sae_kernels.train.trainer import TrainingResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.train.config import TrainConfig
    from sae_kernels.train.end_to_end import EndToEndLoss

    Batches = Iterable[TokenBatch | Tensor | Mapping[str, Tensor]]
    OnStep = Callable[[int, dict[str, Any] | None], None]


def train_end_to_end(
    model: nn.Module,
    batches: Batches,
    layer: str,
    sae: SparseAutoencoder,
    config: TrainConfig,
    weights: EndToEnd | None = None,
    *,
    folder: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Trains an SAE in place with :func:`~sae_kernels.train.end_to_end_loss` under torch's Adam.

    Args:
        model: frozen, in evaluation mode; left as it was.
        batches: token ids or :class:`~sae_kernels.harvest.TokenBatch`, one a step; gone through
            again where they end before the steps do, which an iterator does not allow. Batches of
            fewer than two tokens to replace, which have no variance, are passed over.
        layer: the dotted path of the layer that the SAE reconstructs.
        sae: fresh (:func:`~sae_kernels.train.prepare_end_to_end`), or trained on the layer's
            activations before; on the model's device.
        config: the settings, as of the composable route; batch_size says nothing here.
        weights: see :func:`~sae_kernels.train.end_to_end_loss`.
        folder: where run.json, metrics.jsonl and the SAE go; None keeps everything in memory.
        metadata: joins what run.json says about the model, the layer and the weights.
        on_step: called after every step with the step and, when one was made, its metric line.

    Raises:
        NonFiniteError: a loss or gradient norm was NaN or infinite and config says "stop".
        ValueError: fewer batches than steps; otherwise as ``end_to_end_loss``. The SAE keeps what
            it learnt before either, and is saved.
    """
    config = dataclasses.replace(config, route="composable")
    weights = weights or EndToEnd()
    check_fits(sae, layer_width(model, layer, weights), layer)
    check_end_to_end(sae, config, weights)
    if config.fix_shrinkage:
        raise ValueError(
            "fix_shrinkage: expected false end to end (it fits stored activations), got true"
        )
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    about = {"model": name, "layer": layer, **dataclasses.asdict(weights), **(metadata or {})}
    settings = {"sae": sae.config.to_dict(), "train": config.to_dict(), "end_to_end": about}
    loop = _Loop(model, layer, sae, config, weights)
    training = sae.training
    try:
        with run_folder(folder, sae, settings) as log:
            lines = MetricLines(config, log, on_step)
            return loop.run(_repeated(batches, weights.keep_first), lines)
    finally:
        sae.train(training)


def _repeated(batches: Batches, keep_first: bool) -> Iterator[TokenBatch]:
    """The usable batches, over and over; ends where going through them again gives none."""
    found = True
    while found:
        found = False
        for inputs in batches:
            batch = TokenBatch.of(inputs)
            if batch.replaced(keep_first).sum() > 1:
                found = True
                yield batch


class _Loop(Progress):
    def __init__(
        self,
        model: nn.Module,
        layer: str,
        sae: SparseAutoencoder,
        config: TrainConfig,
        weights: EndToEnd,
    ) -> None:
        super().__init__(sae, config)
        self.model, self.layer, self.weights = model, layer, weights
        sae.compute_dtype = compute_dtype(config.compute, sae.W_enc.device)
        self.optimizer = autograd.adam(sae, config)
        self.tokens = self.skipped = 0

    def run(self, batches: Iterator[TokenBatch], lines: MetricLines) -> TrainingResult:
        config, start = self.config, time.perf_counter()
        for i in range(config.steps):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(
                    f"batches: expected one for each of the {config.steps} steps, got {i}; lower "
                    "steps, or give a list, which is gone through again"
                )
            result = self._step(i, batch)
            seconds = time.perf_counter() - start
            lines.add(i, self._line(i, result, seconds) if lines.due(i) else None)
        seconds = time.perf_counter() - start
        dead = self.dead.mask().cpu()
        return TrainingResult(self.sae, lines.kept, seconds, dead, self.skipped)

    def _step(self, i: int, batch: TokenBatch) -> EndToEndLoss:
        sae, config = self.sae.train(), self.config
        k = k_at(sae, config, i)
        spliced = SplicedSAE(sae, self.layer, self.weights, self.schedule, self.dead, k)
        result = measured_loss(self.model, batch, spliced)
        assert spliced.measured is not None
        # The gradients come from all over the model, so their norm is looked at in any case.
        limit = math.inf if config.clip_norm is None else config.clip_norm
        finite = autograd.update(sae, self.optimizer, result.loss, self._lr(i), limit)
        if not finite and config.on_nonfinite == "stop":
            raise NonFiniteError.in_step(i)
        n_tokens = int(batch.attention_mask.sum())
        self.advance(spliced.measured.fired, n_tokens, result.l0, finite)
        self.tokens += n_tokens
        self.skipped += not finite
        return result

    def _lr(self, i: int) -> float:
        return self.config.learning_rate(i, self.sae.config.n_latents)

    def _line(self, i: int, result: EndToEndLoss, seconds: float) -> dict[str, Any]:
        k = k_at(self.sae, self.config, i)
        return {
            "step": i + 1,
            "tokens": self.tokens,
            **{name: float(value.detach()) for name, value in result._asdict().items()},
            "dead_fraction": float(self.dead.mask().float().mean()),
            "lr": self._lr(i),
            **({} if k is None else {"k": k}),
            "skipped": self.skipped,
            "tokens_per_second": self.tokens / seconds,
        }
