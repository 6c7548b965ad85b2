"""A run from its settings to its results, kept whatever ends it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.bench.provenance import gpu_provenance, provenance
from sae_kernels.bench.results import Record, Results, Writer
from sae_kernels.bench.run import Run, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.providers import Provider


class Session(NamedTuple):
    """What came of a run.

    Attributes:
        results: all that was measured.
        interrupted: whether Ctrl-C ended it.
    """

    results: Results
    interrupted: bool


def measure(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    settings: Settings,
    out: Path | None = None,
    tell: Callable[[Record], None] = lambda line: None,
    show: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
) -> Session:
    """Measures cases; every line goes out as soon as its case is done.

    Args:
        cases, providers, settings: what, who and how.
        out: a file for the lines.
        tell: takes each line, provenance first.
        show: takes the progress.
    """
    facts, interrupted = _facts(settings), False
    found: list[Record] = []
    with Run(providers, settings, show) as run, ExitStack() as files:
        try:
            for records in run.records(cases):
                if not found:  # by now it is known what every contestant runs on
                    facts["libraries"] = run.libraries
                    tell({"provenance": facts})
                    writer = None if out is None else files.enter_context(Writer(out, facts))
                for record in records:
                    found.append(record)
                    tell(record)
                    if writer is not None:
                        writer.write(record)
        except KeyboardInterrupt:
            interrupted = True
    return Session(Results(facts, found), interrupted)


def _facts(settings: Settings) -> dict[str, Any]:
    facts: dict[str, Any] = provenance("sae-kernels", settings.threads)
    if settings.device == "cuda":
        facts |= gpu_provenance(torch.device("cuda"))
    return {**facts, "rounds": settings.rounds, "budget_s": settings.budget_s}
