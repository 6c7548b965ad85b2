"""The training loop: data in, steps, metric lines out, the SAE saved at the end."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.data.batches import RowSource, ShuffledBatches, TensorRows
from sae_kernels.data.joint import JointRows
from sae_kernels.errors import NonFiniteError
from sae_kernels.nn import ReLUSAE
from sae_kernels.runs.folder import MetricLines, run_folder
from sae_kernels.train.composable import ComposableStep
from sae_kernels.train.compute import training_device
from sae_kernels.train.fresh import check_width, fresh_sae, split
from sae_kernels.train.objective import k_at
from sae_kernels.train.shrinkage import fit_scales, scale_latents_
from sae_kernels.train.step import FusedStep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sae_kernels.nn import SAEConfig, SparseAutoencoder
    from sae_kernels.train.config import TrainConfig
    from sae_kernels.train.step import StepResult

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

    sae: SparseAutoencoder
    metrics: list[dict[str, Any]]
    seconds: float
    dead: torch.Tensor
    skipped: int


def prepare(
    source: RowSource | torch.Tensor, sae_config: SAEConfig, config: TrainConfig
) -> SparseAutoencoder:
    """A fresh SAE whose scales and b_dec are estimated on a random sample of the source.

    A transcoder's source holds its targets too, to the right of its inputs.
    """
    source = TensorRows(source) if isinstance(source, torch.Tensor) else source
    device = training_device(config.device)
    check_width(source.d_in, sae_config)
    if source.n_tokens < config.batch_size:
        raise ValueError(
            f"batch_size: expected at most the {source.n_tokens} rows of activations, "
            f"got {config.batch_size}"
        )
    rows = min(_SAMPLE, source.n_tokens)
    sample = next(ShuffledBatches(source, rows, seed=config.seed))
    return fresh_sae(sample, sae_config, config, device)


def train(
    source: RowSource | torch.Tensor,
    sae_config: SAEConfig,
    config: TrainConfig,
    *,
    target: RowSource | torch.Tensor | None = None,
    folder: str | Path | None = None,
    on_step: Callable[[int, dict[str, Any] | None], None] | None = None,
) -> TrainingResult:
    """Trains an SAE of any architecture.

    Args:
        source: raw activations, a tensor [N, D] or a :class:`~sae_kernels.train.ShardDataset`; for
            a crosscoder its layers side by side (:class:`~sae_kernels.train.JointRows`).
        sae_config: the SAE; its scales are replaced by estimates if config asks.
        config: the settings.
        target: what a transcoder is to reconstruct, of the same tokens.
        folder: where run.json, metrics.jsonl and the SAE go; None keeps everything in memory.
        on_step: called after every step with the step and, when one was made, its metric line.

    Raises:
        NonFiniteError: a loss or gradient norm was NaN or infinite and config says "stop". The
            weights are those before that step, and are saved.

    Example:
        >>> from sae_kernels.nn import TopKConfig
        >>> from sae_kernels.train import TrainConfig
        >>> x = torch.randn(512, 8)
        >>> result = train(x, TopKConfig(8, 32, 4), TrainConfig(steps=20, batch_size=64))
        >>> len(result.metrics), result.skipped
        (2, 0)
    """
    if target is not None:
        source = JointRows([source, target])
    sae = prepare(source, sae_config, config)
    loop = _Loop(sae, source, config)
    settings = {"sae": sae.config.to_dict(), "train": config.to_dict()}
    with run_folder(folder, sae, settings) as log:
        return loop.run(MetricLines(config, log, on_step))


class _Loop:
    def __init__(
        self,
        sae: SparseAutoencoder,
        source: RowSource | torch.Tensor,
        config: TrainConfig,
    ) -> None:
        self.sae, self.config = sae, config
        make = FusedStep if config.route == "fused" else ComposableStep
        self.step = make(sae, config)
        self.batches = ShuffledBatches(source, config.batch_size, seed=config.seed)
        self.skipped = torch.zeros((), dtype=torch.int64, device=sae.W_enc.device)

    def run(self, lines: MetricLines) -> TrainingResult:
        try:
            return self._run(lines)
        finally:  # whatever happened, the weights are saved next
            if isinstance(self.step, FusedStep):
                self.step.restore_()

    def _run(self, lines: MetricLines) -> TrainingResult:
        config, device = self.config, self.sae.W_enc.device
        start = time.perf_counter()
        for i in range(config.steps):
            x, target = split(next(self.batches).to(device), self.sae.config)
            lr = config.learning_rate(i, self.sae.config.n_latents)
            k = k_at(self.sae, config, i)
            result = self.step(x, lr=lr, k=k, target=target)
            self.skipped += result.skipped
            due = lines.due(i)
            # On the CPU looking costs nothing; elsewhere it would stall the step.
            if config.on_nonfinite == "stop" and (due or device.type == "cpu"):
                self._stop_if_skipped(i)
            line = self._line(i, result, lr, k, time.perf_counter() - start) if due else None
            lines.add(i, line)
        if config.fix_shrinkage:
            self._fix_shrinkage()
        seconds = time.perf_counter() - start
        dead = self.step.dead.mask().cpu()
        return TrainingResult(self.sae, lines.kept, seconds, dead, int(self.skipped))

    def _fix_shrinkage(self) -> None:
        assert isinstance(self.sae, ReLUSAE)
        if isinstance(self.step, FusedStep):
            self.step.restore_()
        scale_latents_(self.sae, fit_scales(self.sae, self.batches.source, seed=self.config.seed))

    def _stop_if_skipped(self, i: int) -> None:
        if self.skipped:
            raise NonFiniteError.in_step(i)

    def _line(
        self, i: int, result: StepResult, lr: float, k: float | None, seconds: float
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
            **({} if k is None else {"k": k}),
            "skipped": int(self.skipped),
            "tokens_per_second": tokens / seconds,
        }
