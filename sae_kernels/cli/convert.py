"""Command ``sae-kernels convert``: rewrites an SAE in another tool's format."""

from pathlib import Path
from typing import Annotated

import typer

from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, Json, Overwrite
from sae_kernels.cli.output import Output
from sae_kernels.errors import DataError


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A folder of a saved SAE, its weights file, or a hub name."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the copy.")],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="Format of the copy, as native or saelens.")
    ],
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="FORMAT", help="Format of SRC. [default: detected]"),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewrite an SAE in another tool's format. The function stays the same.

    docs/formats.md has the formats; a wrong name lists them.
    """
    from sae_kernels import formats

    formats.known(to, "--to", written=True)
    if from_ is not None:
        formats.known(from_, "--from")
    check_free(out, overwrite)
    others = [name for name in formats.present(out) if name != to]
    if others:
        raise DataError(
            f"{out}: expected no SAE of another format, got {others[0]}; choose another folder, "
            "or the two would be mixed"
        )
    found = formats.locate(source, from_)
    weights = formats.read(*found)
    formats.write(out, weights, to)
    config, tensors, _ = weights
    values = {
        "from": found.format,
        "to": to,
        "architecture": config.architecture,
        "d_in": config.d_in,
        "n_latents": config.n_latents,
        "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
        "folder": str(out),
    }
    output = Output(as_json)
    output.record(values)
    output.text(
        f"{config.architecture}, {config.d_in:,} to {config.n_latents:,} latents in "
        f"{values['dtype']}: {out} ({to}, from {found.format})"
    )
