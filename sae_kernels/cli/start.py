"""Starts runs for ``train``, ``resume`` and ``sweep``: opens the data and trains."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import typer

from sae_kernels.cli.data import check_data, opener
from sae_kernels.cli.files import check_free
from sae_kernels.cli.output import is_first
from sae_kernels.cli.progress import follow, summarise
from sae_kernels.training.run_config import RunConfig, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sae_kernels.cli.data import RunData
    from sae_kernels.cli.output import Output
    from sae_kernels.config.data import DataConfig
    from sae_kernels.config.parallel import ParallelConfig
    from sae_kernels.config.toml import Tables
    from sae_kernels.distributed.team import Team
    from sae_kernels.training.run_config import Widths

METRICS = ("loss", "fvu", "l0")


def opened(tables: Tables, open_data: Callable[[DataConfig], RunData]) -> tuple[RunConfig, RunData]:
    """Opens a run's data and completes its settings by their widths."""
    data = open_data(data_config(tables))
    return completed(tables, data.widths), data


def completed(tables: Tables, widths: Widths) -> RunConfig:
    """A run's settings with the widths of its data."""
    whole = RunConfig.from_tables(tables, widths)
    if whole.sae.transcodes and not widths.targets:
        raise ValueError("--target: expected the activations that the transcoder reconstructs")
    return whole


def data_config(tables: Tables) -> DataConfig:
    """The settings of a run's data, which must fit its architecture."""
    from sae_kernels.config.data import DataConfig

    config = DataConfig(**tables.get("data", {}))
    check_data(config, kind_of_data(tables))
    return config


def start(
    tables: Tables,
    out: Path,
    output: Output,
    *,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Trains one run and prints its summary."""
    from sae_kernels import training
    from sae_kernels.training.layout import fitted, reason

    again = f"sae-kernels resume {shlex.quote(str(out))}"
    with (
        interruptible(again, out),
        processes(tables) as team,
        output.progress() as show,
    ):
        together = nullcontext if team is None else team.together
        with together():
            if not resume and is_first():
                check_free(out, overwrite)
            own, data = data_config(tables), None
            if team is None or team.rank in parallel_config(tables).model_ranks(team.size):
                data = opener(own, tables, show, verify=verify)(own)
        widths = data and data.widths
        if team is not None:  # others than the last may not have the model
            widths = team.told(widths, by=team.size - 1)
        assert widths is not None
        with together():
            config = completed(tables, widths)
            parallel = config.parallel
            if team is not None and len(train_on := parallel.training_ranks(team.size)) > 1:
                parallel = fitted(parallel, len(train_on), config.sae, config.train)
                output.text(reason(parallel, config.sae, config.train))
        result = training.train(
            config.sae,
            data and data.source,
            config.train,
            folder=out,
            output=config.output,
            data=config.data.to_table(),
            resume=resume,
            overwrite=overwrite,
            on_step=follow(output, show, config.train.steps),
            mesh=None if team is None else team.mesh,
            parallel=parallel,
        )
    if result.metrics:  # a process that runs the model for others has none
        summarise(output, result, out, METRICS)
    if left_out := getattr(data and data.source, "left_out", 0):
        output.text(f"{left_out:,} rows left out, their norm above the bound of max_norm_multiple")


def parallel_config(tables: Tables) -> ParallelConfig:
    """The settings of several processes."""
    from sae_kernels.config.parallel import ParallelConfig

    return ParallelConfig(**tables.get("parallel", {}))


@contextmanager
def processes(tables: Tables) -> Iterator[Team | None]:
    """The processes that torchrun started for a run; None: there is this one alone."""
    parallel = parallel_config(tables)
    several = max(parallel.latents_over, parallel.tokens_over, 1 + parallel.harvest_ranks) > 1
    if not several and "WORLD_SIZE" not in os.environ:
        yield None
        return
    from sae_kernels.distributed.launch import launched
    from sae_kernels.distributed.team import Team

    with launched(parallel, tables.get("train", {}).get("device", "auto")) as mesh:
        yield Team(mesh, parallel.timeout)


@contextmanager
def interruptible(again: str, *runs: Path) -> Iterator[None]:
    """On Ctrl-C and SIGTERM prints the command ``again`` that continues these runs."""
    from sae_kernels.runs import checkpoint
    from sae_kernels.runs.folder import holds_run

    def saved() -> str | None:
        if not any(map(holds_run, runs)):
            return None
        steps = [step for run in runs for step in checkpoint.steps(run / checkpoint.CHECKPOINTS)]
        return f"checkpoint of step {max(steps)} saved" if steps else "no checkpoint yet"

    with stopped(again, saved):
        yield


@contextmanager
def stopped(again: str, saved: Callable[[], str | None]) -> Iterator[None]:
    """On Ctrl-C and SIGTERM prints what is saved and the command ``again`` that goes on from it.

    Args:
        again: a command.
        saved: what is saved by then; None prints nothing.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        where = saved()
        if where is None:
            raise
        if is_first():
            print(f"sae-kernels: stopped, {where}; go on with: {again}", file=sys.stderr)
        code = error.code if isinstance(error, SystemExit) else None
        raise typer.Exit(code if isinstance(code, int) else 130) from error


def kind_of_data(tables: Tables) -> str:
    """The data that the tables' architecture trains on, as ``Preset.data`` calls them."""
    if "architecture" not in tables:
        return kind_of(tables).preset.data
    sae = tables.get("sae", {})
    several = "s" if sae.get("n_layers", 1) > 1 else ""
    transcodes = sae.get("d_out") is not None or sae.get("skip")
    return ("target" if transcodes else "layer") + several
