"""The report's figures, each as a PNG file and as an SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plots import Drawing, drawings
from .plotstyle import CSS_NAMES, house_style

if TYPE_CHECKING:
    from .data import RunReport


@dataclass(frozen=True)
class RenderedFigure:
    """One figure, ready to be written.

    Attributes:
        name: file stem, also the prefix of every id inside ``svg``.
        alt: what the figure shows, for readers who do not see it.
        caption: how to read it.
        png: the image on white, as the bytes of a PNG file.
        svg: the same image as an inline ``<svg>`` element, coloured by CSS variables.
    """

    name: str
    alt: str
    caption: str
    png: bytes
    svg: str


def draw_figures(report: RunReport) -> list[RenderedFigure]:
    """Draw every figure of ``report``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with house_style("the report's figures"):
        return [_render(drawing) for drawing in drawings(report)]


def _render(drawing: Drawing) -> RenderedFigure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Small on purpose: the same drawing must be readable half a desktop wide and on a phone.
    figure = Figure(figsize=(4.9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    drawing.draw(figure)
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=220, facecolor="white")
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    return RenderedFigure(
        drawing.name,
        drawing.alt,
        drawing.caption,
        png.getvalue(),
        _inline_svg(svg.getvalue(), drawing.name),
    )


def _inline_svg(svg: str, name: str) -> str:
    """Cut a standalone SVG down to an element several of which can share one HTML page."""
    svg = svg[svg.index("<svg") :].strip()
    opening, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]+"', opening)
    assert view_box is not None
    # Its rule for "*" would reach the whole page; the page's own sheet has it for figures.
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)
    rest = rest.replace("xlink:href", "href").replace('href="#', f'href="#{name}-')
    rest = rest.replace("url(#", f"url(#{name}-").replace(' id="', f' id="{name}-')
    for colour, variable in CSS_NAMES.items():
        rest = rest.replace(colour, f"var(--{variable})")
    return f'<svg {view_box[0]} aria-hidden="true">{rest}'
