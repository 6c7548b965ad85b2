"""Command ``sae-kernels explain``: which backend runs a primitive, which layout a run has."""

import difflib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sae_kernels import backends, primitives
from sae_kernels.cli.options import Debug, Json
from sae_kernels.cli.output import Output
from sae_kernels.cli.settings import given, with_flags
from sae_kernels.training.layout import fitted, reason
from sae_kernels.training.run_config import RunConfig

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


LAYOUT = "layout"


@with_flags("parallel")
def explain(
    what: Annotated[
        str, typer.Argument(help=f"{LAYOUT}, or a primitive: {', '.join(primitives.NAMES)}.")
    ],
    device: Annotated[
        str | None, typer.Option(help="Device of the tensors. [default: cpu, or the run's]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES), help="Dtype of the operands. [default: float32, or the run's]"
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Of a layout: how many processes torchrun starts.", min=1)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Of a layout: the run's TOML, as of train or its run.toml.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Show which backend runs a primitive or which layout several processes have, and why."""
    _check("WHAT", what, (LAYOUT, *primitives.NAMES))
    output = Output(as_json)
    if what != LAYOUT:
        for name, value in {"processes": processes, "config": config, **flags}.items():
            if value is not None:
                raise ValueError(f"--{name.replace('_', '-')}: expected it with {LAYOUT} alone")
        _primitive(output, what, device or "cpu", dtype or "float32")
        return
    if processes is None or config is None:
        raise ValueError("layout: expected --processes and --config, got one or none of them")
    tables = given(config, flags, None, ("parallel",))
    if device is not None:
        tables["train"] = {**tables.get("train", {}), "device": device}
    if dtype is not None:
        tables["optimizer"] = {**tables.get("optimizer", {}), "compute": dtype}
    _layout(output, RunConfig.from_tables(tables), processes)


def _layout(output: Output, run: RunConfig, processes: int) -> None:
    there = len(run.parallel.training_ranks(processes))
    parallel = fitted(run.parallel, there, run.sae, run.train)
    why = reason(parallel, run.sae, run.train)
    names = ("latents_over", "tokens_over", "harvest_ranks")
    layout = {name: getattr(parallel, name) for name in names}
    output.record({"processes": processes, **layout, "reason": why})
    output.text(why)
    if parallel.harvest_ranks:
        output.text(f"the last {parallel.harvest_ranks} of {processes} processes run the model")


def _primitive(output: Output, primitive: str, device: str, dtype: str) -> None:
    _check("--dtype", dtype, tuple(DTYPES))
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"--device: expected a device such as cpu or cuda:0, got {device!r}"
        ) from error
    choice, origin = backends.requested()
    candidates = backends.candidates(primitive, where, DTYPES[dtype])
    able = [c.backend for c in candidates if c.reason is None and choice in (None, c.backend)]
    runs = able[0] if able else None
    note = None if runs is None else backends.note(primitive, runs, DTYPES[dtype])
    output.record(
        {
            "primitive": primitive,
            "device": str(where),
            "dtype": dtype,
            "backend": runs,
            "note": note,
            "requested": choice,
            "origin": origin,
            "candidates": [{"backend": c.backend, "reason": c.reason} for c in candidates],
        }
    )
    output.text(
        f"{primitive} on {where} in {dtype} "
        + (f"runs on {runs}" if runs else f"cannot run on {choice or 'any backend'}")
        + f" ({origin})"
    )
    output.table([(f"  {c.backend}", verdict(c, runs, note)) for c in candidates])


def verdict(candidate: backends.Candidate, runs: str | None, note: str | None) -> str:
    """Whether a candidate backend runs, why not, and what there is to know if it does."""
    if candidate.reason is not None:
        return f"no: {candidate.reason}"
    if candidate.backend != runs:
        return "could, but is not chosen"
    return "runs" if note is None else f"runs; {note}"


def _check(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        near = difflib.get_close_matches(given, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what}: expected one of {', '.join(known)}, got {given!r}{hint}")
