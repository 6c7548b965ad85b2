"""Writing an analysis to a folder as JSON and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.analyze.plots import draw
from sae_kernels.io.files import json_writer, publish_all
from sae_kernels.runs.metrics import jsonable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_kernels.analyze.analysis import Analysis

ANALYSIS_FILE = "analysis.json"


def write_analyses(analyses: Sequence[Analysis], folder: str | Path, **made: Any) -> list[Path]:
    """Writes ``analysis.json`` and the pictures, after all are made.

    Args:
        analyses: one an SAE.
        folder: made when missing; other files in it stay.
        made: what else the JSON says of how it was made.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be made or written.
    """
    values = {**made, "saes": [analysis.values() for analysis in analyses]}
    files: dict[str, Callable[[Path], object]] = {ANALYSIS_FILE: json_writer(jsonable(values))}
    files |= {f"{picture.name}.png": _bytes_writer(picture.png) for picture in draw(analyses)}
    publish_all(folder, files)
    return [Path(folder) / name for name in files]


def _bytes_writer(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)
