"""Command ``sae-kernels train``: trains an SAE on activations."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sae_kernels.cli.data import absolute
from sae_kernels.cli.options import Debug, Json, Overwrite, Resume, Verify
from sae_kernels.cli.output import Output
from sae_kernels.cli.settings import arch_help, given, with_flags
from sae_kernels.cli.start import start

_TABLES = ("data", "sae", "objective", "optimizer", "train", "output", "parallel")


@with_flags(*_TABLES)
def train(
    out: Annotated[Path, typer.Option(help="Folder for the run.")],
    data: Annotated[
        list[Path] | None,
        typer.Argument(help="Folder of activations; several for a crosscoder, in order."),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help=arch_help("layer", "target", "layers", "targets"))
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML: arch, and the tables " + ", ".join(f"[{name}]" for name in _TABLES) + "."
        ),
    ] = None,
    resume: Resume = False,
    verify: Verify = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Train an SAE on activations from disk or from a model. Flags override the TOML file."""
    tables = given(config, flags, arch, _TABLES)
    if data:
        tables["data"]["folders"] = [str(folder) for folder in data]
    tables["data"] = absolute(tables["data"])
    start(tables, out, Output(as_json), resume=resume, overwrite=overwrite, verify=verify)
