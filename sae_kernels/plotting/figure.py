"""Drawings rendered to files: each as a PNG and, for pages, as an SVG in the page's colours."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.plotting.style import CSS_NAMES, house_style

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A picture to draw, with its alternative text and caption.

    Attributes:
        name: file stem, also the prefix of every id inside an SVG.
        draw: draws on an empty figure, whose size it may change.
        alt: what the picture shows, for readers who do not see it.
        caption: how to read it.
    """

    name: str
    draw: Callable[[Figure], None]
    alt: str = ""
    caption: str = ""


class Picture(NamedTuple):
    """A rendered drawing (see :class:`Drawing` for name, alt and caption).

    Attributes:
        png: the image on white, as the bytes of a PNG file.
        svg: the same as an inline ``<svg>`` element coloured by CSS variables; empty if not wanted.
    """

    name: str
    alt: str
    caption: str
    png: bytes
    svg: str


def render(
    drawings: Iterable[Drawing],
    what: str,
    *,
    size: tuple[float, float] = (6.0, 3.9),
    dpi: int = 200,
    svg: bool = False,
) -> list[Picture]:
    """Renders drawings to PNG and SVG in the common style.

    Args:
        drawings: what to draw.
        what: what needs matplotlib, for the error without it.
        size: width and height of a figure in inches, unless its drawing changes them.
        dpi: of the PNG.
        svg: whether to render the SVG too.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> (picture,) = render([Drawing("line", lambda f: f.subplots().plot([1, 2]))], "a test")
        >>> picture.name, picture.png[1:4], picture.svg
        ('line', b'PNG', '')
    """
    with house_style(what):
        return [_render(drawing, size, dpi, svg) for drawing in drawings]


def _render(drawing: Drawing, size: tuple[float, float], dpi: int, svg: bool) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    drawing.draw(figure)
    png, text = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=dpi, facecolor="white")
    if svg:
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    inline = inline_svg(text.getvalue(), drawing.name) if svg else ""
    return Picture(drawing.name, drawing.alt, drawing.caption, png.getvalue(), inline)


def inline_svg(svg: str, name: str) -> str:
    """Reduces a standalone SVG to an element; several can share one HTML page."""
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
