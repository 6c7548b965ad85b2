"""Printing results on a terminal, fitted to its width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.bench.output import cells
from sae_kernels.plotting import tables
from sae_kernels.plotting.tables import say

if TYPE_CHECKING:
    from rich.console import Console

    from sae_kernels.bench.results import Record, Results


def show(results: Results, console: Console) -> None:
    """Prints every case: times, ratios, memory, achieved rates and phases."""
    say(console, machine(results.provenance))
    say(console, cells.LEGEND)
    for case in cells.cases(results):
        console.print()
        say(console, case.name, "bold")
        if case.columns:
            tables.show(case.who, case.columns, console)
        if case.phases:
            console.print()
            say(console, "phases, ms")
            tables.show(case.phases[:2], case.phases[2:], console)
        for line in case.remarks:
            say(console, line)
    for note in results.notes or ([] if results.records else ["nothing was measured"]):
        say(console, note)


def machine(provenance: Record) -> str:
    """The machine and software versions in one line."""
    named = ("isa", "threads", "python", "torch", "triton", "commit")
    place = [str(provenance[name]) for name in ("device", "cpu") if provenance.get(name)]
    facts = [f"{name} {provenance[name]}" for name in named if provenance.get(name)]
    return ", ".join([*place, *facts]) + (" with changes" if provenance.get("dirty") else "")
