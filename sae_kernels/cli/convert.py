"""``sae-kernels convert``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, Json, Overwrite
from sae_kernels.cli.output import Output
from sae_kernels.errors import DataError, name_hint

if TYPE_CHECKING:
    from sae_kernels.formats import Weights

FORMATS = ("native", "saelens", "sparsify", "dictionary_learning", "gemma_scope")
WRITTEN = FORMATS[:4]


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A folder of a saved SAE, or its weights file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the copy.")],
    to: Annotated[str, typer.Option(metavar="|".join(WRITTEN), help="Format of the copy.")],
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="|".join(FORMATS), help="Format of SRC, if files mislead."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rewrite an SAE in another tool's format; the function stays the same."""
    from sae_kernels import formats

    _check("--to", to, WRITTEN)
    if from_ is not None:
        _check("--from", from_, FORMATS)
    check_free(out, overwrite)
    others = [name for name in formats.present(out) if name != to]
    if others:
        raise DataError(
            f"{out}: expected no SAE of another format, got {others[0]}; choose another folder, "
            "or the two would be mixed"
        )
    kind = formats.detect(source) if from_ is None and Path(source).exists() else from_ or "native"
    weights = formats.read(source, kind)
    _write(weights, out, to)
    config, tensors, _ = weights
    values = {
        "from": kind,
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
        f"{values['dtype']}: {out} ({to}, from {kind})"
    )


def _write(weights: "Weights", out: Path, to: str) -> None:
    from sae_kernels import formats, nn

    config, tensors, metadata = weights
    if to == "saelens":
        formats.write_saelens(out, config, tensors, metadata)
    elif to == "sparsify":
        formats.write_sparsify(out, config, tensors)
    elif to == "dictionary_learning":
        formats.write_dictionary_learning(out, config, tensors, metadata)
    else:
        sae = nn.from_weights(config, tensors)
        sae.metadata = metadata
        sae.save_pretrained(out)


def _check(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{option}: got {given!r}; {name_hint(given, known)}")
