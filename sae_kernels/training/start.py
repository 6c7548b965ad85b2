"""Starts or resumes runs: makes SAE, step and folder, or restores the newest checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.config.parallel import ParallelConfig
from sae_kernels.data.sources import is_rows
from sae_kernels.errors import DataError
from sae_kernels.gpu import training_device
from sae_kernels.nn import SparseAutoencoder, build
from sae_kernels.runs.folder import RunFolder, holds_run
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.training.fresh import Samples
from sae_kernels.training.graphed_step import GraphedStep, eager_reason
from sae_kernels.training.origin import record
from sae_kernels.training.run import TrainingRun
from sae_kernels.training.run_config import run_defaults, run_tables
from sae_kernels.training.trainable import ActivationTraining

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import ExitStack

    from sae_kernels.config.output import OutputConfig
    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.data.rows import RowSource
    from sae_kernels.data.shared import Share
    from sae_kernels.data.sources import Stream
    from sae_kernels.distributed.latents import LatentRanks
    from sae_kernels.distributed.team import Team
    from sae_kernels.step import TrainingStep
    from sae_kernels.training.run import OnStep

    MakeStep = Callable[..., TrainingStep]


class Planned(NamedTuple):
    """A run before it starts: its SAE, as a configuration or a module, and its settings.

    Attributes:
        sae, config: as given.
        data: description of the activations for run.toml.
        share: its columns, if several runs read their layers together.
        fitted: whether the SAE has its scales already, so that none are estimated.
        ranks: the processes that the SAE's latents are spread over; None: this one alone.
        parallel: how they share the run.
    """

    sae: SAEConfig | SparseAutoencoder
    config: TrainConfig
    data: Mapping[str, Any] = {}
    share: Share | None = None
    fitted: bool = False
    ranks: LatentRanks | None = None
    parallel: ParallelConfig = ParallelConfig()

    @property
    def latents(self) -> range | None:
        """The latents that are here; None: all."""
        return None if self.ranks is None else self.ranks.latents

    @property
    def sae_config(self) -> SAEConfig:
        """The SAE's configuration without estimated scales."""
        sae = self.sae
        found: SAEConfig = sae.config if isinstance(sae, SparseAutoencoder) else sae
        if self.fitted or self.config.normalize_activations == "none":
            return found
        return dataclasses.replace(found, activation_scale=1.0, target_scale=1.0)


@dataclasses.dataclass(frozen=True)
class RunLocation:
    """Folder and output settings of runs, and what to do with runs already there."""

    folder: str | Path | None
    output: OutputConfig
    resume: bool
    overwrite: bool
    team: Team | None = None

    def holds(self, name: str) -> bool:
        """Whether the folder has a run of this name."""
        return self.folder is not None and holds_run(Path(self.folder, name))

    def open(self, stack: ExitStack, name: str, plan: Planned, **more: Any) -> RunFolder | None:
        """Opens a run's folder until the stack closes; ``more`` tables go into its run.toml."""
        if self.folder is None:
            return None
        make: Callable[..., RunFolder] = RunFolder
        if self.team is not None:
            from sae_kernels.distributed.folder import TeamFolder

            with torch.device("meta"):
                like = build(plan.sae_config, latents=plan.latents)
            make = functools.partial(TeamFolder, self.team, like)
        folder = make(
            Path(self.folder, name),
            run_tables(plan.sae_config, plan.config, plan.data, self.output, plan.parallel) | more,
            self.output,
            resume=self.resume,
            overwrite=self.overwrite,
            defaults=run_defaults(plan.sae_config),
        )
        return stack.enter_context(folder)


def make_step(
    sae: SparseAutoencoder, config: TrainConfig, ranks: LatentRanks | None = None
) -> TrainingStep:
    """The training step of the configured route, replayed as a CUDA graph where it can be.

    Args:
        sae: in training.
        config: the settings.
        ranks: the processes that have the SAE's other latents; None: all are here.
    """
    route = FusedStep if config.route == "fused" else AutogradStep
    step = route(
        sae,
        config.objective,
        config.optimizer,
        steps=config.steps,
        seed=config.seed,
        ranks=ranks,
    )
    if ranks is not None:
        return step
    if isinstance(step, FusedStep) and config.cuda_graph and eager_reason(step) is None:
        return GraphedStep(step)
    return step


def check_spread(plan: Planned, source: RowSource | Stream, step: MakeStep) -> None:
    """Raises ValueError for a run that several processes cannot share."""
    for what, fits, expected in (
        ("sae", not isinstance(plan.sae, SparseAutoencoder), "a configuration, got a module"),
        (
            "activations",
            is_rows(source) or hasattr(source, "spread_over"),
            "stored ones or LiveBatches, got other batches",
        ),
        ("micro_batch_size", plan.config.micro_batch_size is None, "none, got one"),
        ("resample_every", plan.config.resample_every is None, "none, got one"),
        ("step", step is make_step, "the package's own, got another"),
    ):
        if not fits:
            raise ValueError(f"{what}: with latents over processes expected {expected}")


class TrainerFactory:
    """Makes the trainings of several runs on one source."""

    def __init__(
        self, source: RowSource | Stream, runs: Mapping[str, Planned], step: MakeStep = make_step
    ) -> None:
        self.runs, self._samples, self._make_step = runs, Samples(source), step

    def __call__(self, name: str, sae: SparseAutoencoder | None = None) -> ActivationTraining:
        """The training of a run, with an SAE prepared on the source unless one is given."""
        plan = self.runs[name]
        if sae is None:
            sae = self._samples.prepared(plan.sae, plan.config, plan.share, plan.ranks)
            joint = self._samples.source
            facts = getattr(joint, "facts", {}) if plan.share is None else plan.share.facts(joint)
            record(sae.metadata, facts)
        source = self._samples.source if plan.share is None else plan.share.own
        rows = source if is_rows(source) else None
        others = {} if plan.ranks is None else {"ranks": plan.ranks}
        step = self._make_step(sae, plan.config, **others)
        return ActivationTraining(step, plan.config, rows, plan.share)


def start_run(
    make: TrainerFactory,
    name: str,
    fresh: ActivationTraining | None,
    folder: RunFolder | None,
    on_step: OnStep | None,
    place: Mapping[str, Any] | None = None,
) -> TrainingRun[torch.Tensor]:
    """A fresh run, or one restored from its folder's checkpoint."""
    if folder is None or folder.checkpoint is None:
        return TrainingRun(fresh or make(name), folder, on_step, place)
    sae = restored(folder, make.runs[name])
    run = TrainingRun(make(name, sae), folder, on_step, place)
    run.load()
    return run


def restored(folder: RunFolder, plan: Planned) -> SparseAutoencoder:
    """The SAE of a folder's checkpoint, loaded into the given module or a new one."""
    loaded, wanted = folder.load_sae(), plan.sae_config.architecture
    if loaded.config.architecture != wanted:
        raise DataError(
            f"{folder.checkpoint}: expected an SAE of architecture {wanted!r}, got "
            f"{loaded.config.architecture!r}"
        )
    device = training_device(plan.config.device)
    if isinstance(plan.sae, SparseAutoencoder):
        sae = plan.sae.to(device)
        sae.config = loaded.config
    else:
        sae = build(loaded.config, device=device, latents=plan.latents)
    sae.load_state_dict(loaded.state_dict())
    sae.metadata = loaded.metadata
    return sae
