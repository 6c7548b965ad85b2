"""Command ``sae-kernels convert``: rewrites SAEs in another tool's format."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, Json, Overwrite
from sae_kernels.cli.output import Output
from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_kernels.formats import Weights

_SETS = "circuit_tracer"  # the format of which a folder holds several SAEs
_PLACE = "as blocks.6.hook_resid_post; {layer} stands for the number of SRC's layer"


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="A folder of a saved SAE, its weights file, or a hub name; several for a set.",
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
    layer: Annotated[
        int | None, typer.Option(min=0, help="Which of circuit-tracer's transcoders in SRC.")
    ] = None,
    activation_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor of activations that a SAELens folder asks for without having it."
        ),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model, if SRC lacks it or another is meant.")
    ] = None,
    hook_name: Annotated[
        str | None, typer.Option(help=f"TransformerLens' name of what the SAE reads, {_PLACE}.")
    ] = None,
    hook_name_out: Annotated[
        str | None, typer.Option(help="The same of what a transcoder reconstructs.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewrite an SAE in another tool's format. The function stays the same.

    docs/formats.md has the formats; a wrong name lists them. Several transcoders, one a layer, make
    a set for circuit-tracer.
    """
    from sae_kernels import formats

    formats.known(to, "--to", written=True)
    if from_ is not None:
        formats.known(from_, "--from")
    if len(sources) > 1 and to != _SETS:
        raise ValueError(
            f"SRC: expected one with --to {to}, got {len(sources)}; of several only {_SETS} makes "
            "one folder"
        )
    check_free(out, overwrite)
    others = [name for name in formats.present(out) if name != to]
    if others:
        raise DataError(
            f"{out}: expected no SAE of another format, got {others[0]}; choose another folder, "
            "or the two would be mixed"
        )
    found = [formats.locate(source, from_, layer=layer) for source in sources]
    names = {"model": model_name, "hook_name": hook_name, "hook_name_out": hook_name_out}
    made: list[dict[str, Any]] = []

    def read() -> "Iterator[Weights]":
        for place in found:
            weights = formats.read(*place, activation_scale=activation_scale)
            made.append({"from": place.format, "to": to, **_facts(weights), "folder": str(out)})
            yield weights._replace(metadata=_named(weights.metadata, place.path, names))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        if to == _SETS:
            formats.write_transcoder_set(out, map(formats.folded, read()))
        else:
            formats.write(out, next(read()), to)
    for warning in said:
        print(f"sae-kernels: warning: {warning.message}", file=sys.stderr)
    output = Output(as_json)
    for facts in made:
        output.record(facts)
        output.text(
            f"{facts['architecture']}, {facts['d_in']:,} to {facts['n_latents']:,} latents in "
            f"{facts['dtype']}: {out} ({to}, from {facts['from']})"
        )


def _named(metadata: dict[str, Any], path: Path, names: dict[str, str | None]) -> dict[str, Any]:
    """Metadata with the names that the user gives, the layer's number filled in."""
    from sae_kernels import formats
    from sae_kernels.config.places import activation_facts, block_number

    place = activation_facts(metadata)
    number = block_number(place.get("hook_name"), place.get("layer"))
    if number is None and any("{layer}" in (name or "") for name in names.values()):
        raise ValueError(
            f"{path}: expected a file that says its layer, for the {{layer}} of --hook-name; name "
            "the layer itself"
        )
    filled = {key: name and name.replace("{layer}", str(number)) for key, name in names.items()}
    return formats.named(metadata, **filled)


def _facts(weights: "Weights") -> dict[str, Any]:
    config = weights.config
    return {
        "architecture": config.architecture,
        "d_in": config.d_in,
        "n_latents": config.n_latents,
        "dtype": str(weights.tensors["W_dec"].dtype).removeprefix("torch."),
    }
