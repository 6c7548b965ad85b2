"""Command ``sae-kernels report``: draws the page of a run."""

from pathlib import Path
from typing import Annotated

import typer

from sae_kernels.cli.options import Debug, Json
from sae_kernels.cli.output import Output


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of activations; may be repeated, for a crosscoder. [default: the run's]"
        ),
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="Folder of a transcoder's target activations.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page. [default: the run's]")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Measure at most this many tokens.")
    ] = 65536,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Model folder or hub name whose tokenizer shows latents in context."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw the page of a run: curves, latents, measures of its SAE."""
    from sae_kernels.report import write_report
    from sae_kernels.report.run import run_report

    output = Output(as_json)
    with output.progress() as show:
        show("measure", 0, None)
        made = run_report(
            run, data or (), target=target, max_tokens=max_tokens, tokenizer=tokenizer
        )
    page = write_report(made, run if out is None else out)
    measured = made.measured_on if made.latent_density is not None else None
    output.record(
        {"report": page, "measured_on": measured, "title": made.title, "metrics": made.metrics}
    )
    output.text(str(page), made.subtitle)
