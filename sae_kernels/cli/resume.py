"""Command ``sae-kernels resume``: continues a run from its newest checkpoint."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sae_kernels.cli.options import Debug, Json, Verify
from sae_kernels.cli.output import Output
from sae_kernels.cli.start import start
from sae_kernels.errors import DataError


def resume(
    run: Annotated[Path, typer.Argument(help="The folder of a run that has not made its steps.")],
    verify: Verify = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a run from its newest checkpoint. Settings and data are the run's own."""
    from sae_kernels.config.toml import read_tables
    from sae_kernels.runs.folder import RUN_FILE, holds_run
    from sae_kernels.training.run_config import check_tables

    if not holds_run(run):
        raise DataError(f"{run}: expected the folder of a run, it has no {RUN_FILE}; name a run")
    tables = read_tables(run / RUN_FILE)
    if "end_to_end" in tables:
        raise ValueError(
            f"{run}: expected a run on activations, got one through a language model; give its "
            "own command again, with --resume"
        )
    try:
        check_tables(tables)
    except ValueError as error:
        raise ValueError(f"{run / RUN_FILE}: {error}") from error
    if not tables.get("data"):
        raise ValueError(
            f"{run}: expected a run that knows its data, it was given them in Python; go on with "
            "it there, train(..., folder=..., resume=True)"
        )
    # However many processes there were, it goes on with those that are here.
    parallel, world = tables.setdefault("parallel", {}), int(os.environ.get("WORLD_SIZE", "1"))
    if parallel.get("harvest_ranks", 0) >= world:
        parallel["harvest_ranks"] = 0
    trained_by = world - parallel.get("harvest_ranks", 0)
    if parallel.get("latents_over", 0) * parallel.get("tokens_over", 0) != trained_by:
        parallel |= {"latents_over": 0, "tokens_over": 0}
    start(tables, run, Output(as_json), resume=True, verify=verify)
