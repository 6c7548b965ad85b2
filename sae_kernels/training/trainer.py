"""``train`` and ``train_many``: training SAEs on activations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.config.output import OutputConfig
from sae_kernels.config.parallel import ParallelConfig
from sae_kernels.config.train import TrainConfig
from sae_kernels.data.joint import JointRows
from sae_kernels.data.prefetch import Prefetched
from sae_kernels.data.rows import TensorRows
from sae_kernels.data.shared import shared
from sae_kernels.data.sources import IterableStream, batches_of, is_rows, open_source
from sae_kernels.io.files import is_plain_name
from sae_kernels.nn import SparseAutoencoder, architecture, build
from sae_kernels.runs.folder import is_finished
from sae_kernels.training.layout import fitted
from sae_kernels.training.origin import origin
from sae_kernels.training.run import TrainingResult, drive
from sae_kernels.training.run_config import run_tables
from sae_kernels.training.start import (
    Planned,
    RunLocation,
    TrainerFactory,
    check_spread,
    make_step,
    start_run,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed.device_mesh import DeviceMesh

    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.data.rows import RowSource
    from sae_kernels.data.shared import Share
    from sae_kernels.data.sources import Source, Stream
    from sae_kernels.training.run import OnStep
    from sae_kernels.training.start import MakeStep

__all__ = ["TrainingResult", "train", "train_many"]


def train(
    sae: SAEConfig | SparseAutoencoder,
    source: Source | str | Path | Iterable[torch.Tensor] | None,
    config: TrainConfig | None = None,
    *,
    target: RowSource | torch.Tensor | None = None,
    folder: str | Path | None = None,
    output: OutputConfig | None = None,
    data: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    step: MakeStep = make_step,
    mesh: DeviceMesh | None = None,
    parallel: ParallelConfig | None = None,
    **settings: Any,
) -> TrainingResult:
    """Trains an SAE of any architecture on activations.

    Args:
        sae: a module, trained in place (a fresh one, or one loaded or trained before, which
            continues from its weights), or a configuration.
        source: raw activations: a tensor [N, D], a folder of stored ones, any row source such as
            :class:`~sae_kernels.data.ShardDataset`, or batches [B, D] to iterate over; for a
            crosscoder its layers side by side (:class:`~sae_kernels.data.JointRows`); or a stream
            of batches that a model makes (:class:`~sae_kernels.harvest.LiveBatches`). With
            ``parallel.harvest_ranks`` such a stream in the last processes, None in the others.
        config: the settings; or give them by name, as ``steps=10_000, lr=2e-4``.
        target: a transcoder's target activations, of the same tokens.
        folder: folder for the settings, metric lines, checkpoints and the SAE (docs/runs.md); None
            keeps everything in memory.
        output: settings of checkpoints and loggers in the folder.
        data: description of the source for run.toml, so that the run can be repeated.
        resume: continue the run in the folder from its newest intact checkpoint, on the CPU bit for
            bit; a folder without a run starts one.
        overwrite: delete a run in the folder.
        on_step: called after every step with the 0-based step and its metric line or None.
        step: makes the training step from the SAE and the settings, to use your own.
        mesh: the processes that share the run, a
            :class:`torch.distributed.device_mesh.DeviceMesh` of one dimension, or of two named
            "latents" and "tokens"; all call this with the same arguments, and ``sae`` is a
            configuration (docs/distributed.md).
        parallel: with a mesh, how its processes share the run.
        settings: fields of :class:`~sae_kernels.config.TrainConfig`, OptimizerConfig and the
            architecture's objective, by name.

    With a folder SIGINT and SIGTERM save a checkpoint before they end the run; a second signal ends
    the process at once.

    Returns:
        The trained SAE (with a mesh, this process's latents of it), the metric lines and counters;
        of processes that run a model for others neither latents nor lines.

    Raises:
        ValueError: settings, data and SAE that do not fit together; with a mesh, processes that do
            not have the same.
        NonFiniteError: a loss or gradient norm was not finite and ``on_nonfinite`` is "stop". The
            weights are those before that step, and are saved.
        DataError: the folder is in use, or holds another run.
        RankError: with a mesh, another process failed where they work on the folder together.
        OSError: something could not be written; older checkpoints are intact.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import TopKSAE
        >>> result = train(TopKSAE(8, 32, k=4), torch.randn(512, 8), steps=20, batch_size=64)
        >>> len(result.metrics), result.skipped
        (2, 0)
    """
    objective = _architecture(sae).objective_class
    if config is None:
        config = TrainConfig.of(objective, **settings)
    elif settings:
        raise ValueError(f"expected config or settings by name, got both ({', '.join(settings)})")
    parallel = ParallelConfig() if mesh is None or parallel is None else parallel
    plan = Planned(sae, config, dict(data or {}), parallel=parallel)
    location = RunLocation(folder, output or OutputConfig(), resume, overwrite)
    train_on = functools.partial(_train_one, plan, location, target, on_step, step)
    if mesh is None or not parallel.harvest_ranks:
        return train_on(open_source(source), mesh)
    from sae_kernels.distributed.feed import Feed

    feed = Feed(mesh, parallel)
    feed.check(source, run_tables(plan.sae_config, config, {}, OutputConfig(), parallel))
    if feed.runs_model:
        feed.serve(source)
        with torch.device("meta"):
            nothing = build(plan.sae_config, latents=range(0))
        return TrainingResult(nothing, [], 0.0, torch.zeros(0, dtype=torch.bool), 0)
    with feed.batches() as batches:
        return train_on(batches, feed.mesh)


def _train_one(
    plan: Planned,
    location: RunLocation,
    target: RowSource | torch.Tensor | None,
    on_step: OnStep | None,
    step: MakeStep,
    source: RowSource | Stream,
    mesh: DeviceMesh | None,
) -> TrainingResult:
    """Trains one SAE, in this process or with those of a mesh."""
    if isinstance(source, IterableStream):  # the batches are as large as they come
        config = dataclasses.replace(plan.config, batch_size=source.batch_size)
        plan = plan._replace(config=config)
    team = None
    if mesh is not None:
        from sae_kernels.distributed.team import Team

        team = Team(mesh, plan.parallel.timeout)
        with team.together():
            check_spread(plan, source, step)
            parallel = dataclasses.replace(plan.parallel, **team.layout)
            parallel = fitted(parallel, team.size, plan.sae_config, plan.config)
            plan = plan._replace(parallel=parallel)
        data_there = (
            getattr(source, "fingerprint", None) if is_rows(source) else source.state_dict()
        )
        settings_there = run_tables(plan.sae_config, plan.config, {}, OutputConfig(), parallel)
        team.expect_same({**settings_there, "activations": data_there})
        with team.together():
            plan = plan._replace(ranks=team.ranks(plan.sae_config.n_latents, parallel))
    location = dataclasses.replace(location, team=team)
    watch = {} if on_step is None else {"": on_step}
    spread = getattr(source, "spread_over", None)  # a model's stream
    with nullcontext() if team is None or spread is None else spread(team):
        result = _train(source, {"": plan}, target, location, watch, step)[""]
    if result.error is not None:
        raise result.error
    return result


def train_many(
    runs: Mapping[str, tuple[SAEConfig | SparseAutoencoder, TrainConfig]],
    source: Source | str | Path | Iterable[torch.Tensor] | Mapping[str, Source | str | Path],
    *,
    target: RowSource | torch.Tensor | None = None,
    folder: str | Path | None = None,
    output: OutputConfig | None = None,
    data: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Mapping[str, OnStep] | None = None,
) -> dict[str, TrainingResult]:
    """Trains several SAEs on one stream of activations, read once.

    Each result is bitwise that of :func:`train` with the same settings. Widths, k, seeds,
    architectures, learning rates and numbers of steps may differ; the batches may not, so
    ``batch_size`` and the seed of the order (``data_seed``) are the same in all.

    Args:
        runs: SAE and settings of each run, by name.
        source: as of :func:`train`, for all; or one for each run by name: stored activations of the
            same tokens, or streams that differ in their layer alone. These are read together, the
            layers in one pass of the model, and each run trains on its own. A transcoder's has its
            inputs and targets side by side.
        data: description of the source for run.toml; with a source for each run, of each by name.
        folder: holds a folder per run, of its name. When resuming, runs that are finished there are
            left out of the result.
        on_step: callbacks by name, as of :func:`train`.

    The other arguments are those of :func:`train`.

    Returns:
        Results by name. A run that met NaN or infinity has an ``error``; the others go on.

    Raises:
        ValueError: no runs, names that cannot be folders, different batch sizes or data seeds.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import TopKConfig
        >>> config = TrainConfig(steps=20, batch_size=64)
        >>> runs = {f"k{k}": (TopKConfig(8, 32, k), config) for k in (2, 4)}
        >>> {name: r.metrics[-1]["l0"] for name, r in train_many(runs, torch.randn(512, 8)).items()}
        {'k2': 2.0, 'k4': 4.0}
    """
    _check_together(runs)
    if resume and folder is not None:
        runs = {name: run for name, run in runs.items() if not is_finished(Path(folder, name))}
        if not runs:
            return {}
    location = RunLocation(folder, output or OutputConfig(), resume, overwrite)
    if not isinstance(source, Mapping):
        planned = {name: Planned(*run, dict(data or {})) for name, run in runs.items()}
        return _train(open_source(source), planned, target, location, on_step or {}, make_step)
    if target is not None:
        raise ValueError("target: expected none with a source for each run, which has it itself")
    joint, shares = _shared(source, runs)
    planned = {
        name: Planned(*run, dict((data or {}).get(name, {})), shares.get(name))
        for name, run in runs.items()
    }
    return _train(joint, planned, None, location, on_step or {}, make_step)


def _shared(
    sources: Mapping[str, Any], runs: Mapping[str, tuple[Any, TrainConfig]]
) -> tuple[RowSource | Stream, dict[str, Share]]:
    """One source for the runs, and each run's share of it."""
    if missing := sorted(runs.keys() - sources.keys()):
        raise ValueError(f"source: expected one for each run, got none for {', '.join(missing)}")
    opened = {id(sources[name]): open_source(sources[name]) for name in runs}
    config = next(iter(runs.values()))[1]
    own = {name: opened[id(sources[name])] for name in runs}
    return shared(own, config.batch_size, config.order_seed)


def _architecture(sae: SAEConfig | SparseAutoencoder) -> type[SparseAutoencoder]:
    if isinstance(sae, SparseAutoencoder):
        return type(sae)
    name = getattr(sae, "architecture", None)
    if name is None:
        raise TypeError(f"sae: expected a module or its configuration, got {type(sae).__name__}")
    return architecture(name)


def _with_objective(plan: Planned) -> Planned:
    """The plan with the architecture's default objective if it has none."""
    if plan.config.objective is not None:
        return plan
    objective = _architecture(plan.sae).objective_class()
    return plan._replace(config=dataclasses.replace(plan.config, objective=objective))


def _train(
    source: RowSource | Stream,
    runs: Mapping[str, Planned],
    target: RowSource | torch.Tensor | None,
    location: RunLocation,
    on_step: Mapping[str, OnStep],
    step: MakeStep,
) -> dict[str, TrainingResult]:
    given = source
    if target is not None:
        if not is_rows(source):
            raise ValueError("target: expected none with a stream, which holds the targets itself")
        source = JointRows([source, target])
    runs = {name: _with_objective(plan) for name, plan in runs.items()}
    make = TrainerFactory(source, runs, step)
    # Fresh runs are made before folders, so that wrong settings leave no folder behind.
    team = location.team
    with nullcontext() if team is None else team.together():
        waits = [name for name in runs if location.resume and location.holds(name)]
        fresh = {name: make(name) for name in runs if name not in waits}
    with ExitStack() as stack:
        started = {}
        for name, plan in runs.items():
            folder = location.open(stack, name, plan)
            own = given if plan.share is None else plan.share.own
            n_targets = plan.sae_config.n_layers if plan.sae_config.transcodes else 0
            place = origin(own, target, n_targets, location.output)
            run = start_run(make, name, fresh.pop(name, None), folder, on_step.get(name), place)
            started[name] = stack.enter_context(run)
        waiting = [run for run in started.values() if run.active]
        if waiting:
            behind = min(waiting, key=lambda run: run.training.made)
            device, config = behind.training.sae.W_enc.device, behind.training.config
            # Prefetching batches from a model on the CPU would only take cores from the step.
            stored = is_rows(source) and not isinstance(source, TensorRows)
            ranks = runs[""].ranks if "" in runs else None
            # A stream of ranks makes exchanges, which do not mix with the step's in a thread.
            gathers = ranks is not None and not is_rows(source)
            ahead = stored or (device.type != "cpu" and not gathers)
            share = (0, 1) if ranks is None else (ranks.rank, ranks.size)
            batches = batches_of(
                source, config.batch_size, config.order_seed, reuse=not ahead, share=share
            )
            if behind.cursor:
                batches.load_state_dict(behind.cursor)
            if ahead:
                batches = stack.enter_context(Prefetched(batches, device))
            if ranks is not None and not gathers:
                batches = ranks.gathered(batches, config.batch_size)
            on_any_rank = bool if team is None else getattr(source, "any", team.any)
            drive(list(started.values()), batches, on_any_rank)
        return {name: run.result() for name, run in started.items()}


def _check_together(runs: Mapping[str, tuple[Any, TrainConfig]]) -> None:
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
