"""Command ``sae-kernels plan``: predicts time and memory of a run on one or many devices."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_kernels.bench import plan as planning
from sae_kernels.cli import numbers
from sae_kernels.cli.options import Debug, Json
from sae_kernels.cli.output import Output
from sae_kernels.config import OptimizerConfig
from sae_kernels.plotting.units import number

NOTE = "predictions: no part of a step is taken to overlap another"


def plan(
    d_in: Annotated[str, typer.Option(help="Width of the activations.")],
    n_latents: Annotated[str, typer.Option(help="Number of latents; 16M is 16 * 2^20.")],
    k: Annotated[str, typer.Option(help="Latents kept per token.")],
    tokens: Annotated[str, typer.Option(help="Tokens of the run; 40G is 40 * 10^9.")],
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            "--batch-size",
            help="Tokens per step over all GPUs. [default: 2048 per GPU, at most 131072]",
        ),
    ] = None,
    gpus: Annotated[str, typer.Option(help="Number of devices.")] = "1",
    device: Annotated[
        str,
        typer.Option(
            metavar="|".join(planning.NAMES), help="Kind of device; cpu is this machine's."
        ),
    ] = "cpu",
    compute: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16|float16", help="Compute dtype of the kernels' operands."
        ),
    ] = "auto",
    master_weights: Annotated[
        str, typer.Option(metavar="float32|split", help="Storage of W_enc and W_dec.")
    ] = "float32",
    moment_dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16", help="Dtype of Adam's moments.")
    ] = "float32",
    compute_copies: Annotated[
        str, typer.Option(metavar="both|encoder", help="Matrices with a 16-bit compute copy.")
    ] = "both",
    adam: Annotated[
        str,
        typer.Option(
            metavar="dense|lazy", help="Rows that an update visits: all, or those that fired."
        ),
    ] = "dense",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Benchmark results to take rates from; may be repeated. "
            "[default: those of the checkout for this device]"
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict time, memory, communication and bottleneck of a run."""
    where = planning.device(device)
    config: dict[str, Any] = {
        "compute": compute,
        "master_weights": master_weights,
        "moment_dtype": moment_dtype,
        "compute_copies": compute_copies,
        "adam": adam,
    }
    n_gpus = numbers.size(gpus, "--gpus")
    problem = planning.Problem(
        d_in=numbers.size(d_in, "--d-in"),
        n_latents=numbers.size(n_latents, "--n-latents"),
        k=numbers.size(k, "--k"),
        batch=planning.default_batch(n_gpus) if batch is None else numbers.size(batch, "--batch"),
        config=OptimizerConfig(**config),
        dtype=where.dtype(compute),
    )
    total = numbers.tokens(tokens, "--tokens")
    rates = planning.calibrated(where, calibration)
    predictions = planning.predict(problem, n_gpus, where, rates)
    output = Output(as_json)
    _head(output, problem, total, n_gpus, where, rates)
    _layouts(output, predictions, -(-total // problem.batch), problem)


def _head(
    output: Output,
    problem: planning.Problem,
    tokens: int,
    gpus: int,
    device: planning.Device,
    rates: planning.Calibration,
) -> None:
    steps = -(-tokens // problem.batch)
    note = rates.text(device)
    output.record(
        {
            "event": "plan",
            **{name: getattr(problem, name) for name in ("d_in", "n_latents", "k", "batch")},
            "tokens": tokens,
            "steps": steps,
            "gpus": gpus,
            "device": device.name,
            "dtype": problem.dtype,
            "rates": rates.rates,
            "origins": rates.origins,
            "calibration": note,
            "nominal": device.source,
            "note": NOTE,
        }
    )
    output.text(
        f"TopK, d_in {problem.d_in:,}, {problem.n_latents:,} latents, k {problem.k}, "
        f"{problem.dtype}: {tokens:,} tokens in {steps:,} steps of {problem.batch:,}",
        f"{gpus} x {device.name}, {note}",
        f"nominal rates: {device.source}",
        NOTE,
        "",
    )


def _layouts(
    output: Output, predictions: list[planning.Prediction], steps: int, problem: planning.Problem
) -> None:
    best = planning.fastest(predictions)
    for p in predictions:
        output.record(_record(p, problem, steps, p is best))
    bounds = list(predictions[0].seconds.bounds())
    head = ["layout", "GB a GPU", "GB sent", "ms a step", *bounds[:-1], "days", "what rules"]
    output.table([head, *(_row(p, bounds[:-1], steps) for p in predictions)])
    if best is None:
        output.text("", "no layout fits in memory: take more GPUs, split masters or bf16 states")
    elif len(predictions) > 1:
        output.text("", f"fastest that fits: {best.layout.name} ({_split(best.layout)})")
        chosen = planning.unless_told(problem, best.layout.gpus)
        output.text(
            f"train takes {chosen.name} unless told, which sends the fewest bytes of partial sums "
            "and decoder rows"
        )


def _row(p: planning.Prediction, bounds: list[str], steps: int) -> list[str]:
    seconds = p.seconds.bounds()
    rules = p.bound if p.fits else "does not fit in memory"
    return [
        p.layout.name,
        number(p.memory_bytes / 1e9),
        number(p.sent_bytes / 1e9),
        number(1e3 * p.seconds.total),
        *(number(1e3 * seconds[name]) for name in bounds),
        number(steps * p.seconds.total / 86400),
        rules,
    ]


def _split(layout: planning.Layout) -> str:
    return f"--latents-over {layout.shards} --tokens-over {layout.replicas}"


def _record(
    p: planning.Prediction, problem: planning.Problem, steps: int, is_fastest: bool
) -> dict[str, Any]:
    return {
        "event": "layout",
        "layout": p.layout.name,
        "shards": p.layout.shards,
        "replicas": p.layout.replicas,
        "tokens": p.layout.tokens(problem),
        "latents": p.layout.latents(problem),
        "fits": p.fits,
        "bound": p.bound,
        "fastest": is_fastest,
        "step_seconds": p.seconds.total,
        "parts_seconds": dataclasses.asdict(p.seconds),
        "memory_bytes": p.memory_bytes,
        "memory": p.memory,
        "sent_bytes": p.sent_bytes,
        "sent": {message.what: message.bytes for message in p.messages},
        "run_seconds": steps * p.seconds.total,
    }
