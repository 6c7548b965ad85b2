"""What the commands that train have in common: progress, and the summary of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sae_kernels.cli.output import Output, Progress
    from sae_kernels.train import TrainingResult


def follow(
    output: Output, show: Progress, steps: int
) -> Callable[[int, dict[str, Any] | None], None]:
    """What a trainer calls after every step: progress, and a record of each metric line."""

    def on_step(step: int, line: dict[str, Any] | None) -> None:
        show("train", step + 1, steps)
        if line is not None:
            output.record({"event": "metrics", **line})

    return on_step


def summarise(output: Output, result: TrainingResult, out: Path, metrics: Sequence[str]) -> None:
    """The result of a run, with these of its last metrics."""
    from sae_kernels.runs.folder import SAE_FOLDER

    last = result.metrics[-1]
    summary = {
        "steps": last["step"],
        **{name: last[name] for name in ("tokens", *metrics)},
        "dead_fraction": float(result.dead.float().mean()),
        "skipped": result.skipped,
        "seconds": result.seconds,
        "run": out,
        "sae": out / SAE_FOLDER,
    }
    output.record({"event": "result", **summary})
    output.table(
        [(key, f"{v:,.4g}" if isinstance(v, float) else f"{v}") for key, v in summary.items()]
    )
