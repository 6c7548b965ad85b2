"""``sae-kernels train``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sae_kernels.cli.files import Data, check_free
from sae_kernels.cli.options import Debug, Json, Overwrite, Verify
from sae_kernels.cli.output import Output
from sae_kernels.cli.runs import follow, summarise
from sae_kernels.cli.settings import Widths, arch_help, architecture, configs, with_flags
from sae_kernels.train import preset


@with_flags
def train(
    data: Annotated[
        list[Path], typer.Argument(help="A folder of activations; several for a crosscoder.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    arch: Annotated[str | None, typer.Option(help=arch_help("layer", "target", "layers"))] = None,
    target: Annotated[
        Path | None, typer.Option(help="A folder of what a transcoder is to reconstruct.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML with arch and tables [sae] and [train]; flags come first."),
    ] = None,
    verify: Verify = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Train an SAE on activations on disk."""
    from sae_kernels import train as training

    opened = Data.open(data, target)
    wanted = opened.target
    kind = preset(architecture(config, arch)).data
    if wanted is not None and kind != "target":
        raise ValueError(
            "--target: expected none, this architecture reconstructs its input; with --arch "
            "transcoder or skip_transcoder it has another target"
        )
    if kind == "layers" and len(opened.layers) == 1:
        raise ValueError("DATA: expected a folder for each layer of the crosscoder, got one folder")
    if kind == "target" and wanted is None:
        raise ValueError("--target: expected the activations that the transcoder is to reconstruct")
    widths = Widths([s.d_in for s in opened.layers], None if wanted is None else wanted.d_in)
    sae_config, train_config = configs(config, flags, widths, arch)
    if sae_config.transcodes and wanted is None:
        raise ValueError("--target: expected the activations that the transcoder is to reconstruct")
    check_free(out, overwrite)
    source = opened.source
    if verify:
        opened.verify()
    output = Output(as_json)
    with output.progress() as show:
        result = training.train(
            source,
            sae_config,
            train_config,
            target=wanted,
            folder=out,
            on_step=follow(output, show, train_config.steps),
        )
    summarise(output, result, out, ("loss", "fvu", "l0"))
