"""Command ``sae-kernels analyze``: compares the latents of saved SAEs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_kernels.cli.files import Data, check_free
from sae_kernels.cli.options import Debug, Json, Overwrite, Verify
from sae_kernels.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.analyze import Analysis
    from sae_kernels.nn import SparseAutoencoder


def analyze(
    saes: Annotated[
        list[str],
        typer.Argument(metavar="SAE...", help="Folders of saved SAEs, or hub names, to compare."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of activations to encode; may be repeated, for a crosscoder."),
    ] = None,
    target: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a transcoder's target activations; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for analysis.json and the pictures.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Least cosine similarity of duplicate latents.")
    ] = 0.9,
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Compare encoder rows instead of decoder rows.")
    ] = False,
    clusters: Annotated[
        bool, typer.Option("--clusters", help="Look for multi-dimensional features, given --data.")
    ] = False,
    verify: Verify = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure geometry, duplicates and experts of SAEs' latents."""
    from sae_kernels import analyze as analyses

    _check(data, target, verify, threshold, clusters)
    names = _names(saes)
    if out is not None:
        check_free(out, overwrite)
        analyses.check_drawable()
    loaded = _load(saes)
    opened = Data.open(data, target or ()) if data else None
    if opened is not None:
        _try(names, loaded, opened)
        if verify:
            opened.verify()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # here, so that no work is lost to a wrong path
    output = Output(as_json)
    found: list[Analysis] = []
    with output.progress() as show:
        for name, sae in zip(names, loaded, strict=True):
            show(name, 0, None)
            analysis = analyses.analyze(
                sae,
                None if opened is None else opened.source,
                target=None if opened is None else opened.target,
                name=name,
                side="encoder" if encoder else "decoder",
                threshold=threshold,
                clusters=clusters,
                progress=partial(show, name),
            )
            found.append(analysis)
    if out is not None:
        made = {"data": [str(folder) for folder in data or ()], "paths": saes}
        analyses.write_analyses(found, out, **made)
    _print(output, found, out)


def _check(
    data: list[Path] | None,
    target: list[Path] | None,
    verify: bool,
    threshold: float,
    clusters: bool,
) -> None:
    """Raises ValueError for options that do not go together, before anything is read."""
    if not 0 < threshold < 1:
        raise ValueError(f"--threshold: expected a cosine, above 0 and below 1, got {threshold}")
    given = {"--target": bool(target), "--verify": verify, "--clusters": clusters}
    if not data and any(given.values()):
        option = next(name for name, asked in given.items() if asked)
        raise ValueError(f"{option}: expected --data too, got none; see sae-kernels analyze --help")


def _names(saes: "Sequence[str]") -> list[str]:
    """A name for each SAE: its folder's or its run's name, or the full path if these clash."""
    from sae_kernels.runs.folder import SAE_FOLDER

    full = [Path(sae) for sae in saes]
    short = [(path.parent if path.name == SAE_FOLDER else path).name for path in full]
    names = short if all(short) and len(set(short)) == len(saes) else list(saes)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"SAE: expected each SAE once, got {twice} twice")
    return names


def _load(saes: "Sequence[str]") -> "list[SparseAutoencoder]":
    from sae_kernels.nn import SparseAutoencoder

    return [SparseAutoencoder.from_pretrained(sae) for sae in saes]


def _try(names: list[str], saes: "Sequence[SparseAutoencoder]", data: Data) -> None:
    """Evaluates one row with each SAE, so that unfit data are refused before any work."""
    from sae_kernels.report.run_data import FirstRows
    from sae_kernels.training import evaluate

    target = None if data.target is None else FirstRows(data.target, 1)
    for name, sae in zip(names, saes, strict=True):
        try:
            evaluate(sae, FirstRows(data.source, 1), target=target)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _print(output: Output, found: "Sequence[Analysis]", out: Path | None) -> None:
    from sae_kernels.analyze import tables

    for analysis in found:
        output.record({**analysis.values(), "folder": None if out is None else str(out)})
    output.table(tables.comparison(found))
    for analysis in found:
        if rows := tables.by_expert(analysis):
            output.text("", f"experts of {analysis.name}")
            output.table(rows)
    if out is not None:
        output.text("", str(out))
