"""Command ``sae-kernels sweep``: trains several SAEs on one stream of activations."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_kernels.cli.data import absolute, opener
from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, Json, Overwrite, Resume, Verify
from sae_kernels.cli.output import Output
from sae_kernels.cli.start import METRICS, data_config, interruptible, opened
from sae_kernels.errors import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.cli.output import Progress
    from sae_kernels.config.toml import Tables
    from sae_kernels.training import RunConfig, TrainingResult
    from sae_kernels.training.run import OnStep


def sweep(
    file: Annotated[
        Path,
        typer.Argument(help="TOML: the tables of a run, with lists in [sweep] or [[run]] tables."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for all runs, one folder each.")],
    resume: Resume = False,
    verify: Verify = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train several SAEs on one stream of activations, read once."""
    from sae_kernels import training

    runs = _runs_of(file)
    if not resume:
        check_free(out, overwrite)
    output = Output(as_json)
    again = shlex.join(["sae-kernels", "sweep", str(file), "--out", str(out), "--resume"])
    with interruptible(again, *(out / name for name in runs)), output.progress() as show:
        for tables in runs.values():
            tables["data"] = absolute(tables.get("data", {}))
        first = next(iter(runs.values()))
        open_data = opener(data_config(first), first, show, verify=verify)
        each = {name: opened(tables, open_data) for name, tables in runs.items()}
        configs = {name: config for name, (config, _) in each.items()}
        for config in configs.values():
            config.expect_one_process()
        results = training.train_many(
            {name: (config.sae, config.train) for name, config in configs.items()},
            {name: data.source for name, (_, data) in each.items()},
            folder=out,
            output=next(iter(configs.values())).output,
            data={name: config.data.to_table() for name, config in configs.items()},
            resume=resume,
            overwrite=overwrite,
            on_step=_follow(output, show, configs),
        )
    _summarise(output, results, out)


def _runs_of(file: Path) -> "dict[str, Tables]":
    from sae_kernels.config.toml import read_tables
    from sae_kernels.training.sweep import expand

    tables = read_tables(file)
    try:
        return expand(tables)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _follow(
    output: Output, show: "Progress", configs: "Mapping[str, RunConfig]"
) -> "dict[str, OnStep]":
    """Callbacks by run that show the foremost run's progress and record every metric line."""
    most = max(config.train.steps for config in configs.values())
    ahead = 0

    def watch(name: str) -> "OnStep":
        def on_step(step: int, line: dict[str, Any] | None) -> None:
            nonlocal ahead
            if line is not None:
                output.record({"event": "metrics", "run": name, **line})
            if step >= ahead:
                ahead = step + 1
                show(f"train {len(configs)}", ahead, most)

        return on_step

    return {name: watch(name) for name in configs}


def _summarise(output: Output, results: "Mapping[str, TrainingResult]", out: Path) -> None:
    rows: list[tuple[str, ...]] = [("run", *METRICS, "dead", "seconds")]
    for name, result in results.items():
        last = result.metrics[-1] if result.metrics else {}
        values = {key: last.get(key) for key in METRICS}
        values |= {"dead_fraction": float(result.dead.float().mean()), "seconds": result.seconds}
        output.record({"event": "result", "run": name, **values, "error": result.error})
        rows.append((name, *("" if v is None else f"{v:,.4g}" for v in values.values())))
    output.table(rows)
    if not results:
        output.text(f"all runs in {out} have made their steps")
    ended = [f"{name}: {result.error}" for name, result in results.items() if result.error]
    if ended:
        raise NonFiniteError("; ".join(ended))
