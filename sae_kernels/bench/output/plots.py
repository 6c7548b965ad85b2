"""The pictures of a run, each where its records hold at least two points for it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.bench.output import bars, curves, series
from sae_kernels.bench.results import measured, roofs
from sae_kernels.report.plotstyle import house_style

if TYPE_CHECKING:
    from sae_kernels.bench.results import Results
    from sae_kernels.report.plots import Drawing


class Picture(NamedTuple):
    """A drawing as the bytes of a PNG file (see ``Drawing`` for the rest)."""

    name: str
    alt: str
    caption: str
    png: bytes


def draw(results: Results) -> list[Picture]:
    """Draws every picture that the results have points for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with house_style("the pictures of a benchmark"):
        return [_render(drawing) for drawing in drawings(results)]


def drawings(results: Results) -> list[Drawing]:
    """What can be drawn, in the order of the page."""
    shown, split = series.showpiece(results), series.split(results)
    found = []
    if shown:
        found.append(bars.headline(shown))
    found += [curves.speed(axis, lines) for axis in "FBK" if (lines := series.lines(results, axis))]
    axis, dense = series.crossing(results)
    if dense:
        found.append(curves.crossover(axis, dense))
    if memory := series.lines(results, "F", "peak_bytes"):
        found.append(curves.memory(memory))
    points = [
        r for r in measured(results.records) if (r.get("gflops") or 0) > 0 < (r.get("gbps") or 0)
    ]
    if len(points) > 1:
        found.append(curves.roofline(points, *roofs(results)))
    if split:
        found.append(bars.phases(split))
    return found


def _render(drawing: Drawing) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    drawing.draw(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200, facecolor="white")
    return Picture(drawing.name, drawing.alt, drawing.caption, png.getvalue())
