"""The training loop: data in, steps, metric lines out, the SAE saved at the end."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.errors import NonFiniteError
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.train.batches import RowSource, ShuffledBatches, TensorRows, estimate_scale
from sae_kernels.train.composable import ComposableStep
from sae_kernels.train.compute import training_device
from sae_kernels.train.metrics import MetricLog
from sae_kernels.train.step import FusedStep

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.train.config import TrainConfig
    from sae_kernels.train.step import StepResult

RUN_FILE, METRICS_FILE, SAE_FOLDER = "run.json", "metrics.jsonl", "sae"
_SAMPLE = 16384  # rows from which scale and b_dec are estimated


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run leaves.

    Attributes:
        sae: trained, in the scale of training (saving folds the scale).
        metrics: the metric lines.
        seconds: of the loop.
        dead: bool [F], latents that have not fired for ``dead_after_tokens`` tokens.
        skipped: steps skipped because something was not finite.
    """

    sae: TopKSAE
    metrics: list[dict[str, Any]]
    seconds: float
    dead: torch.Tensor
    skipped: int


def prepare(
    source: RowSource | torch.Tensor, sae_config: TopKConfig, config: TrainConfig
) -> TopKSAE:
    """A fresh SAE whose scale and b_dec are estimated on a random sample of the source."""
    source = TensorRows(source) if isinstance(source, torch.Tensor) else source
    device = training_device(config.device)
    if source.d_in != sae_config.d_in:
        raise ValueError(
            f"d_in: expected {source.d_in}, the width of the activations, got {sae_config.d_in}"
        )
    if config.k_start is not None and config.k_start > sae_config.n_latents:
        raise ValueError(
            f"k_start: expected at most n_latents = {sae_config.n_latents}, got {config.k_start}"
        )
    if source.n_tokens < config.batch_size:
        raise ValueError(
            f"batch_size: expected at most the {source.n_tokens} rows of activations, "
            f"got {config.batch_size}"
        )
    rows = min(_SAMPLE, source.n_tokens)
    sample = next(ShuffledBatches(source, rows, seed=config.seed)).float()
    finite = sample.isfinite().all(1)
    if not (finite.any() if config.on_nonfinite == "skip" else finite.all()):
        raise NonFiniteError(
            "activations: expected finite numbers, got NaN or infinity among the first rows; "
            "find what wrote them"
        )
    sample = sample[finite].to(device)
    if config.activation_scale == "sqrt_d":
        scale = estimate_scale(sample, sample.shape[0])
        sae_config = dataclasses.replace(sae_config, activation_scale=scale)
    sae = TopKSAE(sae_config, seed=config.seed, device=device)
    if config.init_b_dec == "geometric_median":
        sae.initialise_b_dec_(sample)
    elif config.init_b_dec == "mean":
        sae.b_dec.data.copy_(sample.mean(0) * sae_config.activation_scale)
    return sae


def train(
    source: RowSource | torch.Tensor,
    sae_config: TopKConfig,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    on_step: Callable[[int, dict[str, Any] | None], None] | None = None,
) -> TrainingResult:
    """Trains a TopK SAE.

    Args:
        source: raw activations, a tensor [N, D] or a :class:`~sae_kernels.train.ShardDataset`.
        sae_config: the SAE; its activation_scale is replaced by the estimate if config asks.
        config: the settings.
        folder: where run.json, metrics.jsonl and the SAE go; None keeps everything in memory.
        on_step: called after every step with the step and, when one was made, its metric line.

    Raises:
        NonFiniteError: a loss or gradient norm was NaN or infinite and config says "stop". The
            weights are those before that step, and are saved.

    Example:
        >>> from sae_kernels.train import TrainConfig
        >>> x = torch.randn(512, 8)
        >>> result = train(x, TopKConfig(8, 32, 4), TrainConfig(steps=20, batch_size=64))
        >>> len(result.metrics), result.skipped
        (2, 0)
    """
    sae = prepare(source, sae_config, config)
    loop = _Loop(sae, source, config, on_step)
    if folder is None:
        return loop.run(None)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"sae": sae.config.to_dict(), "train": config.to_dict()}
    (folder / RUN_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    (folder / METRICS_FILE).unlink(missing_ok=True)
    try:
        with MetricLog(folder / METRICS_FILE) as log:
            return loop.run(log)
    finally:
        sae.save_pretrained(folder / SAE_FOLDER)


class _Loop:
    def __init__(
        self,
        sae: TopKSAE,
        source: RowSource | torch.Tensor,
        config: TrainConfig,
        on_step: Callable[[int, dict[str, Any] | None], None] | None,
    ) -> None:
        self.sae, self.config, self.on_step = sae, config, on_step
        make = FusedStep if config.route == "fused" else ComposableStep
        self.step = make(sae, config)
        self.batches = ShuffledBatches(source, config.batch_size, seed=config.seed)
        self.skipped = torch.zeros((), dtype=torch.int64, device=sae.W_enc.device)
        self.metrics: list[dict[str, Any]] = []

    def run(self, log: MetricLog | None) -> TrainingResult:
        try:
            return self._run(log)
        finally:  # whatever happened, the weights are saved next
            if isinstance(self.step, FusedStep):
                self.step.restore_()

    def _run(self, log: MetricLog | None) -> TrainingResult:
        config, device = self.config, self.sae.W_enc.device
        start = time.perf_counter()
        for i in range(config.steps):
            x = next(self.batches).to(device)
            lr = config.learning_rate(i, self.sae.config.n_latents)
            k = config.k_at(i, self.sae.config.k)
            result = self.step(x, lr=lr, k=k)
            self.skipped += result.skipped
            due = (i + 1) % config.log_every == 0 or i + 1 == config.steps
            # On the CPU looking costs nothing; elsewhere it would stall the step.
            if config.on_nonfinite == "stop" and (due or device.type == "cpu"):
                self._stop_if_skipped(i)
            line = self._line(i, result, lr, k, time.perf_counter() - start) if due else None
            if line is not None:
                self.metrics.append(line)
                if log is not None:
                    log.write(line)
            if self.on_step is not None:
                self.on_step(i, line)
        seconds = time.perf_counter() - start
        dead = self.step.dead.mask().cpu()
        return TrainingResult(self.sae, self.metrics, seconds, dead, int(self.skipped))

    def _stop_if_skipped(self, i: int) -> None:
        if self.skipped:
            raise NonFiniteError(
                f"step {i + 1}: expected a finite loss and gradient norm, got NaN or infinity "
                "(a batch that is not finite, or a diverged run); the weights are those before "
                "it. Lower the learning rate, mend the data or choose on_nonfinite 'skip'"
            )

    def _line(
        self, i: int, result: StepResult, lr: float, k: int, seconds: float
    ) -> dict[str, Any]:
        tokens = (i + 1) * self.config.batch_size
        return {
            "step": i + 1,
            "tokens": tokens,
            "loss": float(result.loss),
            "fvu": float(result.fvu),
            "l0": float(result.l0),
            "aux_loss": float(result.aux_loss),
            "dead_fraction": float(self.step.dead.mask().float().mean()),
            "lr": lr,
            "k": k,
            "skipped": int(self.skipped),
            "tokens_per_second": tokens / seconds,
        }
