"""How a run begins: fresh, or where its folder's checkpoint left it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import DataError
from sae_kernels.formats import native
from sae_kernels.nn import build
from sae_kernels.runs.folder import RunFolder, holds_run
from sae_kernels.step.compute import training_device
from sae_kernels.training.on_activations import OnActivations
from sae_kernels.training.run import Run
from sae_kernels.training.run_config import run_defaults, run_tables
from sae_kernels.training.sources import Samples, is_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import ExitStack

    import torch

    from sae_kernels.config.output import OutputConfig
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.data.batches import RowSource
    from sae_kernels.nn import SAEConfig, SparseAutoencoder
    from sae_kernels.training.run import OnStep
    from sae_kernels.training.sources import Stream


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs are kept, and what to do with those that are there."""

    folder: str | Path | None
    output: OutputConfig
    data: dict[str, Any]
    resume: bool
    overwrite: bool

    def holds(self, name: str) -> bool:
        """Whether there is a run of that name."""
        return self.folder is not None and holds_run(Path(self.folder, name))

    def open(
        self, stack: ExitStack, name: str, sae_config: SAEConfig, config: TrainConfig, **more: Any
    ) -> RunFolder | None:
        """The folder of a run, until the stack is left; ``more`` are tables of its run.toml."""
        if self.folder is None:
            return None
        folder = RunFolder(
            Path(self.folder, name),
            run_tables(sae_config, config, self.data, self.output) | more,
            self.output,
            resume=self.resume,
            overwrite=self.overwrite,
            defaults=run_defaults(sae_config),
        )
        return stack.enter_context(folder)


class Make:
    """Makes the trainings of some runs on one source."""

    def __init__(
        self, source: RowSource | Stream, runs: Mapping[str, tuple[SAEConfig, TrainConfig]]
    ) -> None:
        self.runs, self._samples = runs, Samples(source)
        self._rows = source if is_rows(source) else None

    def __call__(self, name: str, sae: SparseAutoencoder | None = None) -> OnActivations:
        """The training of a run, with a fresh SAE unless there is one."""
        sae_config, config = self.runs[name]
        if sae is None:
            sae = self._samples.fresh(sae_config, config)
        return OnActivations(sae, config, self._rows)


def begun(
    make: Make,
    name: str,
    fresh: OnActivations | None,
    folder: RunFolder | None,
    on_step: OnStep | None,
) -> Run[torch.Tensor]:
    """A run as it stands: fresh, or with the state of its folder's checkpoint."""
    if folder is None or folder.checkpoint is None:
        return Run(fresh or make(name), folder, on_step)
    sae_config, config = make.runs[name]
    sae = restored(folder.checkpoint, sae_config, training_device(config.device))
    run = Run(make(name, sae), folder, on_step)
    run.load()
    return run


def restored(path: Path, sae_config: SAEConfig, device: torch.device) -> SparseAutoencoder:
    """The SAE of a checkpoint, in memory of its own."""
    loaded = native.load(path)
    if loaded.config.architecture != sae_config.architecture:
        raise DataError(
            f"{path}: expected an SAE of architecture {sae_config.architecture!r}, got "
            f"{loaded.config.architecture!r}"
        )
    sae = build(loaded.config, device=device)
    sae.load_state_dict(loaded.state_dict())
    return sae
