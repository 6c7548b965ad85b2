"""Command ``sae-kernels demo``: the whole way from a model to a report in a minute."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sae_kernels.cli.options import Debug, Json
from sae_kernels.cli.output import Output


def demo(
    out: Annotated[Path, typer.Option(help="A new folder, or one of an earlier demo.")] = Path(
        "sae-demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 1024 tokens.")] = 600,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the weights and of the data's order.")
    ] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Harvest a small transformer, train an SAE and write a report. It takes about a minute."""
    from sae_kernels.demo import run_demo

    output = Output(as_json)
    with output.progress() as show:
        result = run_demo(
            out,
            steps=steps,
            seed=seed,
            progress=show,
            on_metrics=lambda line: output.record({"event": "metrics", **line}),
        )
    output.record({"event": "result", **dataclasses.asdict(result)})
    output.table(
        [
            ("held-out FVU", f"{result.fvu:.4f}"),
            ("L0", f"{result.l0:.1f}"),
            ("dead latents", f"{result.dead_fraction:.2%}"),
            ("seconds", f"{result.seconds:.1f}"),
            ("SAE", str(result.sae)),
            ("report", str(result.report)),
        ]
    )
