"""``sae-kernels train``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, Json, Overwrite, Verify
from sae_kernels.cli.output import Output
from sae_kernels.cli.settings import configs, with_flags


@with_flags
def train(
    data: Annotated[Path, typer.Argument(help="A folder of activations.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    config: Annotated[
        Path | None, typer.Option(help="TOML with tables [sae] and [train]; flags come first.")
    ] = None,
    verify: Verify = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Train a TopK SAE on activations on disk."""
    from sae_kernels import train as training
    from sae_kernels.train.trainer import SAE_FOLDER

    source = training.ShardDataset(data)
    sae_config, train_config = configs(config, flags, source.d_in)
    check_free(out, overwrite)
    if verify:
        source.verify()
    output = Output(as_json)
    with output.progress() as show:

        def on_step(step: int, line: dict[str, Any] | None) -> None:
            show("train", step + 1, train_config.steps)
            if line is not None:
                output.record({"event": "metrics", **line})

        result = training.train(source, sae_config, train_config, folder=out, on_step=on_step)
    last = {key: result.metrics[-1][key] for key in ("tokens", "loss", "fvu", "l0")}
    summary = {
        "steps": train_config.steps,
        **last,
        "dead_fraction": float(result.dead.float().mean()),
        "skipped": result.skipped,
        "seconds": result.seconds,
        "run": out,
        "sae": out / SAE_FOLDER,
    }
    output.record({"event": "result", **summary})
    output.table(
        [(key, f"{v:,.4g}" if isinstance(v, float) else f"{v}") for key, v in summary.items()]
    )
