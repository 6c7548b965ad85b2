"""Training on activations: data in, steps, metric lines and checkpoints out, the SAE at the end."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.config.output import OutputConfig
from sae_kernels.data.batches import RowSource, TensorRows
from sae_kernels.data.joint import JointRows
from sae_kernels.data.prefetch import Prefetched
from sae_kernels.files import is_plain_name
from sae_kernels.runs.folder import is_finished
from sae_kernels.training.begin import Make, Place, begun
from sae_kernels.training.run import TrainingResult, drive
from sae_kernels.training.sources import Source, batches_of, is_rows, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SAEConfig
    from sae_kernels.training.run import OnStep

__all__ = ["TrainingResult", "prepare", "train", "train_many"]


def train(
    source: Source,
    sae_config: SAEConfig,
    config: TrainConfig,
    *,
    target: RowSource | torch.Tensor | None = None,
    folder: str | Path | None = None,
    output: OutputConfig | None = None,
    data: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Trains an SAE of any architecture.

    Args:
        source: raw activations, a tensor [N, D] or a :class:`~sae_kernels.data.ShardDataset`; for
            a crosscoder its layers side by side (:class:`~sae_kernels.data.JointRows`); or a
            stream of batches that a model makes (:class:`~sae_kernels.harvest.LiveBatches`).
        sae_config: the SAE; its scales are replaced by estimates if config asks.
        config: the settings.
        target: what a transcoder is to reconstruct, of the same tokens.
        folder: where the settings, metric lines, checkpoints and the SAE go (docs/runs.md); None
            keeps everything in memory.
        output: how often to save there, and who else gets the metric lines.
        data: what run.toml says about the source, for whoever repeats the run.
        resume: go on with the run in the folder, from its newest checkpoint that is whole; on the
            CPU it is the same run bit for bit. A folder without a run begins one.
        overwrite: delete the run that the folder holds.
        on_step: called after every step with the step and, when one was made, its metric line.

    With a folder SIGINT and SIGTERM save a checkpoint before they end the run; a second one ends
    the process at once.

    Raises:
        NonFiniteError: a loss or gradient norm was NaN or infinite and config says "stop". The
            weights are those before that step, and are saved.
        DataError: the folder is in use, or holds a run that was not asked for.
        OSError: something could not be written; older checkpoints are intact.

    Example:
        >>> from sae_kernels.nn import TopKConfig
        >>> from sae_kernels.config import TrainConfig
        >>> x = torch.randn(512, 8)
        >>> result = train(x, TopKConfig(8, 32, 4), TrainConfig(steps=20, batch_size=64))
        >>> len(result.metrics), result.skipped
        (2, 0)
    """
    place = Place(folder, output or OutputConfig(), dict(data or {}), resume, overwrite)
    watch = None if on_step is None else {"": on_step}
    result = _train(source, {"": (sae_config, config)}, target, place, watch or {})[""]
    if result.error is not None:
        raise result.error
    return result


def train_many(
    source: Source,
    runs: Mapping[str, tuple[SAEConfig, TrainConfig]],
    *,
    target: RowSource | torch.Tensor | None = None,
    folder: str | Path | None = None,
    output: OutputConfig | None = None,
    data: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Mapping[str, OnStep] | None = None,
) -> dict[str, TrainingResult]:
    """Trains several SAEs on one stream of activations, which is read once.

    Each is bit for bit what :func:`train` makes of the same settings alone. Widths, k, seeds,
    architectures, learning rates and numbers of steps may differ; the batches may not, so
    ``batch_size`` and the seed of the order (``data_seed``) are the same in all.

    Args:
        runs: by name, the SAE and the settings.
        folder: each run has the folder of its name in it. Runs there that have made all their steps
            are left out of what is returned when resuming.
        on_step: by name, as of :func:`train`.

    The other arguments are those of :func:`train`.

    Returns:
        By name; where something was not finite the result's ``error`` says so, and the others went
        on.

    Example:
        >>> from sae_kernels.nn import TopKConfig
        >>> from sae_kernels.config import TrainConfig
        >>> config = TrainConfig(steps=20, batch_size=64)
        >>> runs = {f"k{k}": (TopKConfig(8, 32, k), config) for k in (2, 4)}
        >>> {name: r.metrics[-1]["l0"] for name, r in train_many(torch.randn(512, 8), runs).items()}
        {'k2': 2.0, 'k4': 4.0}
    """
    _check_together(runs)
    if resume and folder is not None:
        runs = {name: run for name, run in runs.items() if not is_finished(Path(folder, name))}
    place = Place(folder, output or OutputConfig(), dict(data or {}), resume, overwrite)
    return _train(source, runs, target, place, on_step or {})


def _train(
    source: Source,
    runs: Mapping[str, tuple[SAEConfig, TrainConfig]],
    target: RowSource | torch.Tensor | None,
    place: Place,
    on_step: Mapping[str, OnStep],
) -> dict[str, TrainingResult]:
    if target is not None:
        if not isinstance(source, torch.Tensor) and not is_rows(source):
            raise ValueError("target: expected none with a stream, which holds the targets itself")
        source = JointRows([source, target])
    source = TensorRows(source) if isinstance(source, torch.Tensor) else source
    make = Make(source, runs)
    # Made first where they can be: what is wrong with the settings then leaves no folder behind.
    fresh = {name: make(name) for name in runs if not (place.resume and place.holds(name))}
    with ExitStack() as stack:
        opened = {}
        for name in runs:
            folder = place.open(stack, name, *runs[name])
            opened[name] = stack.enter_context(
                begun(make, name, fresh.pop(name, None), folder, on_step.get(name))
            )
        waiting = [run for run in opened.values() if run.waits]
        if waiting:
            behind = min(waiting, key=lambda run: run.training.made)
            device = behind.training.sae.W_enc.device
            # On a CPU a model's batches would take their cores from the step, ahead or not.
            stored = is_rows(source) and not isinstance(source, TensorRows)
            ahead = stored or device.type != "cpu"
            batches = batches_of(source, behind.training.config, reuse=not ahead)
            if behind.cursor:
                batches.load_state_dict(behind.cursor)
            if ahead:
                batches = stack.enter_context(Prefetched(batches, device))
            drive(list(opened.values()), batches)
        return {name: run.result() for name, run in opened.items()}


def _check_together(runs: Mapping[str, tuple[SAEConfig, TrainConfig]]) -> None:
    """Raises ValueError for runs that cannot share their batches, or their names."""
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    for name in runs:
        if not is_plain_name(name):
            raise ValueError(f"runs: expected names that a folder can have, got {name!r}")
    for what in ("batch_size", "order_seed"):
        values = {name: getattr(config, what) for name, (_, config) in runs.items()}
        if len(set(values.values())) > 1:
            setting = "data_seed" if what == "order_seed" else what
            raise ValueError(
                f"{setting}: expected the same in all runs, which share their batches, got {values}"
            )
