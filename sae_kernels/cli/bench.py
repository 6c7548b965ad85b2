"""Command ``sae-kernels bench``: measures operators and training steps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae_kernels.bench import cases, environments, providers
from sae_kernels.cli.files import Data, check_free
from sae_kernels.cli.options import Debug, Json, Overwrite
from sae_kernels.cli.output import Output
from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.providers import Provider
    from sae_kernels.bench.results import Record, Results
    from sae_kernels.bench.run import BenchSettings

_DEFAULT = {"cpu": "cpu-small", "cuda": "gpu-small"}
_OTHERS = [name for name in providers.GROUPS if name != "ours"]


def bench(
    preset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Cases: {', '.join(cases.PRESETS)}; may be repeated. [default: cpu-small, or "
            "gpu-small with --device cuda]",
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="NAME,...|all",
            help=f"Contestants beside ours: {', '.join(_OTHERS)}. A package's +ours is the package "
            "alone and accelerated by ours, at each level.",
        ),
    ] = "dense",
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only cases whose name matches.")
    ] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all cases together.")] = 270.0,
    rounds: Annotated[int, typer.Option(min=1, help="Most repetitions of each contestant.")] = 7,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each contestant. [default: torch's]")
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Device to measure on.")] = "cpu",
    data: Annotated[
        Path | None, typer.Option(help="Folder of activations, instead of random ones.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this .jsonl file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw pictures and a report into this folder.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Compare with the results in this .jsonl file.")
    ] = None,
    race: Annotated[
        bool,
        typer.Option(
            "--race",
            help="Train all, at the first step of the preset, for equal shares of the budget, and "
            "compare FVU on held-out tokens.",
        ),
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be measured, what not and why.")
    ] = False,
    setup_peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...|all",
            help=f"Install {', '.join(environments.PEERS)} into environments of their own.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure operators and training steps against other packages."""
    output = Output(as_json)
    if setup_peers is not None:
        peers = _names(setup_peers, list(environments.PEERS))
        with output.progress() as show:
            return environments.setup(peers, lambda text: show(text, 0, None))
    if device not in _DEFAULT:
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    if listed:
        return _list(preset or list(cases.PRESETS), only, output)
    who = providers.chosen(_names(against, _OTHERS), device)
    chosen = cases.chosen(preset or [_DEFAULT[device]], only)
    source = None if data is None else Data.open([data], []).source
    if source is not None:
        chosen = [cases.real(case, source.d_in) for case in chosen]
    if dry_run:
        return _dry_run(chosen, who, device, output)
    from sae_kernels.bench import results, run

    stored = None if compare is None else results.read(compare)
    _check_places(out, plot, overwrite)
    number = {} if threads is None else {"threads": threads}
    settings = run.BenchSettings(device, rounds=rounds, budget_s=budget, data=source, **number)
    if race and stored is not None:
        raise ValueError("--compare: expected results of the same cases, got a race; leave it out")
    if race:
        return _race(chosen, who, settings, out, plot, output)
    _measure(chosen, who, settings, out, plot, stored, output)


def _names(text: str, every: "Sequence[str]") -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    return list(every) if names == ["all"] else names


def _list(presets: "Sequence[str]", only: str | None, output: Output) -> None:
    rows = [("preset", "case")]
    for case in cases.chosen(presets, only):
        of = [name for name in presets if case in cases.PRESETS[name]]
        output.record({**case.facts(), "presets": of})
        rows.append((", ".join(of), case.name))
    output.table(rows)


def _dry_run(
    chosen: "Sequence[Case]", who: "Sequence[Provider]", device: str, output: Output
) -> None:
    rows = [("case", "provider", "dtype", "")]
    for case in chosen:
        for provider in who:
            reason = provider.unable(case, device)
            facts = {"provider": provider.name, "dtype": provider.dtype, "unable": reason}
            output.record({**case.facts(), **facts})
            verdict = "would run" if reason is None else f"no: {reason}"
            rows.append((case.name, provider.name, provider.dtype, verdict))
    output.table(rows)


def _check_places(out: Path | None, plot: Path | None, overwrite: bool) -> None:
    if out is not None and out.exists() and not overwrite:
        raise DataError(f"{out}: expected a new file; choose another --out, or --overwrite")
    if out is not None and not out.parent.is_dir():
        raise DataError(f"{out}: expected a file in a folder that is there; make it first")
    if plot is not None:
        check_free(plot, overwrite)


def _measure(
    chosen: "Sequence[Case]",
    who: "Sequence[Provider]",
    settings: "BenchSettings",
    out: Path | None,
    plot: Path | None,
    stored: "Results | None",
    output: Output,
) -> None:
    from rich.console import Console

    from sae_kernels.bench import run
    from sae_kernels.bench.output import cells, compare, page
    from sae_kernels.bench.processes import ended_by_signals
    from sae_kernels.gpu import training_device

    training_device(settings.device)  # says what is missing
    with ended_by_signals(), output.progress() as show:
        results, ended = run.measure(chosen, who, settings, out, output.record, show)
    if not output.as_json:
        console = Console()
        cells.show(results, console)
        if stored is not None:
            compare.show(results, stored, console)
    if plot is not None and results.records:
        output.text(f"report: {page.write(results, plot)}")
    if ended is not None:
        raise ended


def _race(
    chosen: "Sequence[Case]",
    who: "Sequence[Provider]",
    settings: "BenchSettings",
    out: Path | None,
    plot: Path | None,
    output: Output,
) -> None:
    from contextlib import ExitStack

    from sae_kernels.bench import race
    from sae_kernels.bench.output import race as pictures
    from sae_kernels.bench.processes import ended_by_signals
    from sae_kernels.runs.metrics import MetricLog

    case = next((case for case in chosen if case.operation == "step"), chosen[0])
    with ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        show = stack.enter_context(output.progress())
        lines = None
        if out is not None:
            out.unlink(missing_ok=True)
            lines = stack.enter_context(MetricLog(out))

        def tell(line: "Record") -> None:
            output.record(line)
            if lines is not None:
                lines.write(line)

        records = race.race(case, who, settings, tell, show)
    output.table(pictures.table(records))
    output.text(*(f"{r['provider']} {r['dtype']}: {r['reason']}" for r in records if "reason" in r))
    if plot is not None:
        output.text(f"picture: {pictures.draw(records, plot / 'race.png')}")
