"""Command ``sae-kernels explain``: which backend runs a primitive, and why."""

import difflib
from typing import Annotated

import torch
import typer

from sae_kernels import backends, primitives
from sae_kernels.cli.options import Debug, Json
from sae_kernels.cli.output import Output

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def explain(
    primitive: Annotated[str, typer.Argument(help=f"One of {', '.join(primitives.NAMES)}.")],
    device: Annotated[str, typer.Option(help="Device of the tensors.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="|".join(DTYPES), help="Dtype of the operands.")
    ] = "float32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which backend runs a primitive, and why the others do not."""
    _check("PRIMITIVE", primitive, primitives.NAMES)
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
    output = Output(as_json)
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
