"""What a run leaves: its settings, its metric lines, its SAE."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.runs.metrics import MetricLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.train.config import TrainConfig

    OnStep = Callable[[int, dict[str, Any] | None], None]

RUN_FILE, METRICS_FILE, SAE_FOLDER = "run.json", "metrics.jsonl", "sae"


class MetricLines:
    """The metric lines of a run: kept, written and handed on.

    Args:
        config: says how often there is one.
        log: where they are written; None: nowhere.
        on_step: called after every step with the step and, when one was made, its line.

    Attributes:
        kept: all of them.
    """

    def __init__(self, config: TrainConfig, log: MetricLog | None, on_step: OnStep | None) -> None:
        self._config, self._log, self._on_step = config, log, on_step
        self.kept: list[dict[str, Any]] = []

    def due(self, i: int) -> bool:
        """Whether step i (from 0) has a line."""
        return (i + 1) % self._config.log_every == 0 or i + 1 == self._config.steps

    def add(self, i: int, line: dict[str, Any] | None) -> None:
        """Takes in what step i has to say."""
        if line is not None:
            self.kept.append(line)
            if self._log is not None:
                self._log.write(line)
        if self._on_step is not None:
            self._on_step(i, line)


@contextmanager
def run_folder(
    folder: str | Path | None, sae: SparseAutoencoder, settings: Mapping[str, Any]
) -> Iterator[MetricLog | None]:
    """A run's folder while it trains: metric lines go to what it gives.

    The settings are written first, the SAE whatever happens; None writes nothing.
    """
    if folder is None:
        yield None
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    (folder / METRICS_FILE).unlink(missing_ok=True)
    try:
        with MetricLog(folder / METRICS_FILE) as log:
            yield log
    finally:
        sae.save_pretrained(folder / SAE_FOLDER)
