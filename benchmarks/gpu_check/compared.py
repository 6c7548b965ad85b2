"""The stage that compares: ``sae-kernels bench`` against dense torch and cuSPARSE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.bench import cases, providers
from sae_kernels.bench.run import BenchSettings, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.gpu_check.bench import Record


def compared(out: Path) -> Callable[[bool, float], Iterator[Record]]:
    """The stage, whose results are a file of their own: those of the bench command."""

    def stage(dry: bool, seconds: float) -> Iterator[Record]:
        preset, others, device = (
            "gpu-small",
            ["dense", "dense_compile", "cusparse", "ours-triton"],
            "cuda",
        )
        if dry:
            preset, others, device = "tiny", [], "cpu"
        chosen = cases.chosen([preset], "step|encode|decode")
        who = providers.chosen(others, device)
        settings = BenchSettings(device, rounds=5, budget_s=seconds)
        for record in measure(chosen, who, settings, out)[0].records:
            what = f"{record['case']} {record['provider']} {record['dtype']}"
            if record["status"] in ("failed", "refused"):
                yield {"kind": "failed", "what": what, "why": record["reason"]}
            elif record["status"] == "skipped":
                yield {"kind": "skipped", "what": what, "why": record["reason"]}

    return stage
