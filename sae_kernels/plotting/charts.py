"""Charts of plain numbers: bars, shares, lines against a size, and rooflines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.plotting.axes import band, end_labels, log_ticks, row_axis, size_ticks
from sae_kernels.plotting.style import INK, MUTED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Spread = tuple[float, float, float]
"""A low value, the middle one and a high one."""


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        name: what stands at its end, or in the legend.
        x: where its points are.
        y: their values, with what they range over.
        look: matplotlib's settings for it.
    """

    name: str
    x: list[float]
    y: list[Spread]
    look: dict[str, Any]


def bars(
    figure: Figure,
    names: Sequence[str],
    values: Sequence[Spread],
    texts: Sequence[str],
    colours: Sequence[str],
    bold: int,
) -> Axes:
    """Horizontal bars with whiskers, each with its text written out; one text is bold."""
    figure.set_figheight(max(figure.get_figheight(), 1 + 0.4 * len(names)))
    axes = figure.subplots()
    whiskers = [
        [max(0, y - low) for low, y, _ in values],
        [max(0, high - y) for _, y, high in values],
    ]
    axes.barh(range(len(names)), [y for _, y, _ in values], 0.7, color=colours, xerr=whiskers,
              error_kw={"ecolor": MUTED, "elinewidth": 1.0})  # fmt: skip
    for i, (text, (_, y, high)) in enumerate(zip(texts, values, strict=True)):
        axes.annotate(text, (max(high, y), i), (5, 0), textcoords="offset points", va="center",
                      weight="bold" if i == bold else "normal")  # fmt: skip
    row_axis(axes, names)
    axes.set_xlim(0, 1.4 * max(high for _, _, high in values))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(False)  # the values are written out, and lines would run through them
    return axes


def shares(
    figure: Figure,
    names: Sequence[str],
    parts: dict[str, list[float]],
    colours: dict[str, tuple[str, str]],
    texts: Sequence[str],
) -> Axes:
    """Horizontal bars cut into shares of 100 %, with a text at the end of each.

    Args:
        figure: where to draw.
        names: of the bars.
        parts: the size of each part in every bar, by the part's name; absent ones are left out.
        colours: by part, of the bar and of the number in it.
        texts: one for each bar.
    """
    axes = figure.subplots()
    totals = [sum(of_one) or 1.0 for of_one in zip(*parts.values(), strict=True)]
    left = [0.0] * len(names)
    for part in (p for p in parts if any(parts[p])):
        colour, ink = colours[part]
        widths = [100 * size / total for size, total in zip(parts[part], totals, strict=True)]
        drawn = axes.barh(range(len(names)), widths, 0.7, left, color=colour, label=part)
        written = [f"{w:.0f}" if w >= 4 else "" for w in widths]
        axes.bar_label(drawn, written, label_type="center", color=ink)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, text in enumerate(texts):
        axes.annotate(text, (100, i), (5, 0), va="center", textcoords="offset points",
                      annotation_clip=False)  # fmt: skip
    row_axis(axes, names)
    axes.set_xlim(0, 100)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, columnspacing=1.0,
                  handlelength=1.0)  # fmt: skip
    return axes


def lines(figure: Figure, several: Sequence[Line]) -> Axes:
    """Draws lines, each with the band that its points range over."""
    axes = figure.subplots()
    for each in several:
        low, y, high = (list(values) for values in zip(*each.y, strict=True))
        band(axes, each.x, y, (low, high), label=each.name, **each.look)
    return axes


def finish_sizes(
    axes: Axes, sizes: Sequence[float], text: Callable[[float], str], base: int = 10
) -> None:
    """Sets log scales with the measured sizes as ticks, and names each line at its end."""
    axes.set_xscale("log")
    axes.set_yscale("log", base=base)
    log_ticks(axes.yaxis, text, base)
    size_ticks(axes.xaxis, sizes)
    end_labels(axes)


def roofline(
    figure: Figure, points: Sequence[Line], slope: float, slope_name: str, roofs: dict[str, float]
) -> Axes:
    """Draws points under a roofline: horizontal roofs and a slope, on log scales.

    Args:
        figure: where to draw.
        points: what was achieved.
        slope: of the line through the origin; 0 is not known.
        slope_name: what stands at its upper end.
        roofs: heights by name.
    """
    axes = figure.subplots()
    for each in points:
        y = [middle for _, middle, _ in each.y]
        axes.plot(each.x, y, label=each.name, **{**each.look, "linestyle": ""})
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    bottom = axes.get_ylim()[0]
    top = max([axes.get_ylim()[1], *(1.6 * roof for roof in roofs.values())])
    if slope and roofs:
        low = min(low, 0.5 * min(roofs.values()) / slope)
        high = max(high, 3 * max(roofs.values()) / slope)
    high = max(high, *(1.5 * x for each in points for x in each.x))
    for name, roof in roofs.items():
        ridge = roof / slope if slope else low
        axes.plot([max(ridge, low), high], [roof] * 2, color=INK, linewidth=1.0)
        axes.text(high, roof, f"{name} ", ha="right", va="bottom", fontsize=8.5)
    if slope:
        end = max(roofs.values(), default=top) / slope
        axes.plot([low, end], [low * slope, end * slope], color=INK, linewidth=1.0)
        axes.text(end, end * slope, f"{slope_name}  ", ha="right", va="bottom", fontsize=8.5)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, top)
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)
    _legend_below(figure, [each.name for each in points])
    return axes


def _legend_below(figure: Figure, names: Sequence[str]) -> None:
    """Adds a legend under the axes, in as many columns as fit; the figure grows with its rows."""
    width, height = figure.get_size_inches()
    letters = max(map(len, names), default=0)
    columns = max(1, min(3, int(width / (0.5 + 0.063 * letters))))  # inches, at this font size
    rows = -(-len(names) // columns)
    figure.set_size_inches(width, height + 0.18 * max(0, rows - 4))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
