"""Starts runs for ``train``, ``resume`` and ``sweep``: opens the data and trains."""

from __future__ import annotations

import shlex
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from sae_kernels.cli.data import check_data, open_live, open_stored
from sae_kernels.cli.progress import follow, summarise
from sae_kernels.training.run_config import RunConfig, kind_of, train_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sae_kernels.cli.data import RunData
    from sae_kernels.cli.output import Output, Progress
    from sae_kernels.config.toml import Tables

METRICS = ("loss", "fvu", "l0")


def opened(tables: Tables, show: Progress, *, verify: bool = False) -> tuple[RunConfig, RunData]:
    """Opens a run's data and completes its settings by their widths."""
    from sae_kernels.config.data import DataConfig

    config = DataConfig(**tables.get("data", {}))
    check_data(config, kind_of_data(tables))
    if config.model:
        data = open_live(config, train_config(tables), show)
    else:
        data = open_stored(config, verify)
    whole = RunConfig.from_tables(tables, data.widths)
    if whole.sae.transcodes and data.widths.target is None:
        raise ValueError("--target: expected the activations that the transcoder reconstructs")
    return whole, data


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

    again = f"sae-kernels resume {shlex.quote(str(out))}"
    with interruptible(again, out), output.progress() as show:
        config, data = opened(tables, show, verify=verify)
        result = training.train(
            config.sae,
            data.source,
            config.train,
            target=data.target,
            folder=out,
            output=config.output,
            data=config.data.to_table(),
            resume=resume,
            overwrite=overwrite,
            on_step=follow(output, show, config.train.steps),
        )
    summarise(output, result, out, METRICS)
    if left_out := getattr(data.source, "left_out", 0):
        output.text(f"{left_out:,} rows left out, their norm above the bound of max_norm_multiple")


@contextmanager
def interruptible(again: str, *runs: Path) -> Iterator[None]:
    """On Ctrl-C and SIGTERM prints the command ``again`` that continues these runs."""
    from sae_kernels.runs import checkpoint
    from sae_kernels.runs.folder import holds_run

    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if not any(map(holds_run, runs)):
            raise
        saved = [step for run in runs for step in checkpoint.steps(run / checkpoint.CHECKPOINTS)]
        where = f"checkpoint of step {max(saved)} saved" if saved else "no checkpoint yet"
        print(f"sae-kernels: stopped, {where}; go on with: {again}", file=sys.stderr)
        code = error.code if isinstance(error, SystemExit) else None
        raise typer.Exit(code if isinstance(code, int) else 130) from error


def kind_of_data(tables: Tables) -> str:
    """The data that the tables' architecture trains on: "layer", "target" or "layers"."""
    if "architecture" not in tables:
        return kind_of(tables).preset.data
    sae = tables.get("sae", {})
    if sae.get("d_out") is not None or sae.get("skip"):
        return "target"
    return "layers" if sae.get("n_layers", 1) > 1 else "layer"
