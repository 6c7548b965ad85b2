"""The stage that compares: ``sae-kernels bench`` against dense torch and cuSPARSE."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.gpu_check import journal
from sae_kernels.bench import cases, providers
from sae_kernels.bench.run import BenchSettings, measure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu_check.bench import Record
    from benchmarks.gpu_check.processes import Place

_NAME, _LEAST_S = "bench", 60


def bench(place: Place) -> Iterator[Record]:
    """Runs the bench command into DIR/bench.jsonl; the records here say only what failed."""
    for name in place.todo([_NAME]):
        if place.dry:
            yield journal.done(name, "not available", 0, "its providers need a GPU")
            continue
        if place.left() < _LEAST_S:
            yield journal.done(name, "no time", 0, f"{place.left():.0f} s are left")
            continue
        begin, outcome = time.monotonic(), "passed"
        chosen = cases.chosen(["gpu-small"], "step|encode|decode")
        who = providers.chosen(["dense", "dense_compile", "cusparse", "ours-triton"], "cuda")
        settings = BenchSettings("cuda", rounds=5, budget_s=place.left())
        out = (place.results or place.folder) / "bench.jsonl"
        for record in measure(chosen, who, settings, out)[0].records:
            if record["status"] in ("failed", "refused"):
                what = f"{record['case']} {record['provider']} {record['dtype']}"
                yield {"kind": "failed", "what": what, "task": name, "why": record["reason"]}
                outcome = "failed"
        yield journal.done(name, outcome, time.monotonic() - begin)
