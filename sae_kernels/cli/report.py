"""Command ``sae-kernels report``: draws the page of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_kernels.cli.options import Debug, Json
from sae_kernels.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.interventions import LatentEffects
    from sae_kernels.nn import SparseAutoencoder


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of activations; may be repeated, for a crosscoder. [default: the run's]"
        ),
    ] = None,
    target: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a transcoder's target activations; may be repeated."),
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
    browser: Annotated[
        bool, typer.Option("--browser", help="Make latents.html too, to search all latents.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Causal model, by folder or hub name, whose tokens the latents promote and "
            "suppress; for the browser."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw the page of a run: curves, latents, measures of its SAE."""
    from sae_kernels.report import write_report
    from sae_kernels.report.page import BROWSER
    from sae_kernels.report.run import run_report

    output = Output(as_json)
    with output.progress() as show:
        show("measure", 0, None)
        made = run_report(
            run,
            data or (),
            target=target or (),
            max_tokens=max_tokens,
            tokenizer=tokenizer or model,
            browser=browser or model is not None,
            effects=None if model is None else _effects_in(model),
        )
    page = write_report(made, run if out is None else out)
    latents = None if made.latents is None else page.with_name(BROWSER)
    measured = made.measured_on if made.latent_density is not None else None
    output.record(
        {
            "report": page,
            "latents": latents,
            "measured_on": measured,
            "title": made.title,
            "metrics": made.metrics,
        }
    )
    output.text(str(page), *([str(latents)] if latents else []), made.subtitle)


def _effects_in(model: str) -> "Callable[[SparseAutoencoder], LatentEffects]":
    """What an SAE's latents promote and suppress in a causal model."""
    from sae_kernels.harvest import load_causal_model
    from sae_kernels.interventions import latent_effects

    loaded, _ = load_causal_model(model)
    return lambda sae: latent_effects(sae, loaded, k=5)
