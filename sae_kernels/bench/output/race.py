"""The race as a table and as a picture: FVU on held-out tokens against seconds of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.bench.output.pictures import look
from sae_kernels.bench.output.series import label, title
from sae_kernels.bench.race import curves, finishes
from sae_kernels.io.files import write_bytes
from sae_kernels.plotting import charts
from sae_kernels.plotting import figure as figures
from sae_kernels.plotting.axes import end_labels, log_ticks
from sae_kernels.plotting.charts import Line
from sae_kernels.plotting.units import duration, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from sae_kernels.bench.results import Record

HEAD = ("trainer", "dtype", "steps/s", "FVU at the end", "seconds to the FVU of the last", "ratio")


def table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """A row for each trainer under :data:`HEAD`, the first to reach the worst last FVU first."""
    found = finishes(records)
    return [
        HEAD,
        *(
            (
                each.provider,
                each.dtype,
                number(each.steps_per_second),
                number(each.fvu),
                number(each.seconds),
                f"{each.seconds / found[0].seconds:.3g}x",
            )
            for each in found
        ),
    ]


def draw(records: Sequence[Record], path: str | Path) -> Path:
    """Draws a race into a PNG file, whose folder is made if missing.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nobody was measured.
    """
    lines = curves(records)
    if not lines:
        raise ValueError("expected the records of a race in which somebody was measured, got none")
    drawing = figures.Drawing("race", lambda figure: _draw(figure, list(lines.values())))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, figures.render([drawing], "the picture of a race")[0].png)
    return path


def _draw(figure: Figure, lines: Sequence[Sequence[Record]]) -> None:
    axes = charts.lines(
        figure,
        [
            Line(
                label(line[0]),
                [record["seconds"] for record in line],
                [(record["fvu"],) * 3 for record in line],
                look(line[0]),
            )
            for line in lines
        ],
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    log_ticks(axes.xaxis, duration)
    log_ticks(axes.yaxis, number)
    end_labels(axes)
    axes.set_xlabel("seconds of training, log scale")
    axes.set_ylabel("FVU of held-out tokens, log scale")
    axes.set_title(title(lines[0][0]))
