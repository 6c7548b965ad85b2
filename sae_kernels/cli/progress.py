"""Progress and final summary of a training run, for all commands that train."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sae_kernels.cli.output import Output, Progress
    from sae_kernels.training import TrainingResult


_EVERY = 0.25  # seconds between two updates of the progress
_SHOWN = {"loss": "loss", "kl": "KL", "fvu": "FVU", "l0": "L0"}


def follow(
    output: Output, show: Progress, steps: int
) -> Callable[[int, dict[str, Any] | None], None]:
    """The trainer's ``on_step`` callback: shows progress and records each metric line.

    Progress is shown a few times a second, so that a step costs nothing.
    """
    shown, note = -math.inf, ""

    def on_step(step: int, line: dict[str, Any] | None) -> None:
        nonlocal shown, note
        now = time.monotonic()
        if line is not None:
            note = describe(line)
            output.record({"event": "metrics", **line})
        if now - shown >= _EVERY or step + 1 == steps:
            shown = now
            show("train", step + 1, steps, note)

    return on_step


def describe(line: Mapping[str, Any]) -> str:
    """The main numbers of a metric line, short enough for a line of a terminal.

    >>> describe({"loss": 0.25, "fvu": 0.125, "l0": 32, "dead_fraction": 0.01, "skipped": 2})
    'loss 0.25 FVU 0.125 L0 32 dead 1% skipped 2'
    """
    parts = [f"{name} {line[key]:.3g}" for key, name in _SHOWN.items() if key in line]
    if "dead_fraction" in line:
        parts.append(f"dead {100 * line['dead_fraction']:.2g}%")
    if line.get("skipped"):
        parts.append(f"skipped {line['skipped']}")
    if "tokens_per_second" in line:
        parts.append(f"{_short(line['tokens_per_second'])} tok/s")
    return " ".join(parts)


def _short(value: float) -> str:
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def summarise(output: Output, result: TrainingResult, out: Path, metrics: Sequence[str]) -> None:
    """Prints the result of a run, with the named ones of its last metrics."""
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
