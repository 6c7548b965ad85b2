"""What a run leaves on disk: its settings, its metric lines, its SAE."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.train.metrics import MetricLog

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sae_kernels.nn import SparseAutoencoder

RUN_FILE, METRICS_FILE, SAE_FOLDER = "run.json", "metrics.jsonl", "sae"


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
