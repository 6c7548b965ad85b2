"""Lines, labels and axes that the pictures of a benchmark share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_kernels.bench.output import series
from sae_kernels.report.plotstyle import BLUE, INK, MUTED, ORANGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from sae_kernels.bench.results import Record

# Apart for every common colour blindness, by lightness too, and dark enough for text on white.
_LOOKS = {
    "ours": (BLUE, "o"), "dense": (MUTED, "s"), "dense_compile": (INK, "D"),
    "sparsify": (ORANGE, "^"), "dictionary_learning": ("#00785a", "v"),
    "sae_lens": ("#a3457a", "P"), "cusparse": ("#2f7fb0", "X"), "product": ("#8a6d00", "*"),
}  # fmt: skip


def look(record: Record) -> dict[str, Any]:
    """Colour and marker of a provider; fp32 has hollow marks and dashes."""
    colour, marker = _LOOKS.get(record["provider"], (MUTED, "h"))
    hollow = record["dtype"] == "float32"
    return {
        "color": colour,
        "marker": marker,
        "markersize": 5.5 if record["provider"] == "ours" else 4.5,
        "linewidth": 2.2 if record["provider"] == "ours" else 1.3,
        "linestyle": (0, (5, 2)) if hollow else "-",
        "markerfacecolor": "white" if hollow else colour,
        "zorder": 4 if record["provider"] == "ours" else 3,
    }


def line(
    axes: Axes,
    records: list[Record],
    axis: str,
    value: Callable[[Record, float], float],
    *,
    joined: bool = True,
    name: str = "",
) -> None:
    """Draws a provider's records: a value of each and its time, and a band from p20 to p80.

    Without an axis they stand at their arithmetic intensity.
    """
    x = [float(r[axis]) if axis else r["gflops"] / r["gbps"] for r in records]
    looks = look(records[0]) if joined else {**look(records[0]), "linestyle": ""}
    y = [value(r, r["median_ms"]) for r in records]
    axes.plot(x, y, label=name or series.label(records[0]), **looks)
    if joined:
        low, high = ([value(r, r[name]) for r in records] for name in ("p20_ms", "p80_ms"))
        axes.fill_between(x, low, high, color=looks["color"], alpha=0.15, linewidth=0)


def log_axes(
    axes: Axes, sizes: Sequence[float], text: Callable[[float], str], base: int = 10
) -> None:
    """Both axes on log scales: the sizes that were measured below, plain numbers beside."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (
        (1.0,) if base == 2 or decades > 3.5 else (1.0, 3.0) if decades > 1.7 else (1.0, 2.0, 5.0)
    )
    axes.yaxis.set_major_locator(LogLocator(base, subs=subs, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    if sizes:
        shown = _apart(sizes)
        axes.set_xticks(shown, [f"{size:,g}" for size in shown])
    else:
        left, right = axes.get_xlim()
        subs = (1.0, 2.0, 5.0) if right / left < 1e3 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(10, subs=subs, numticks=9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def end_labels(axes: Axes) -> None:
    """Names every line beside its right end, moved up or down where two would overlap."""
    ends = []
    for drawn in axes.get_lines():
        name = str(drawn.get_label())
        if not name.startswith("_"):
            x, y = (float(np.asarray(data)[-1]) for data in drawn.get_data())
            ends.append((_fraction(axes, y), (x, y), name, drawn.get_color()))
    ends.sort()
    places = spread([end[0] for end in ends], 0.062)
    for place, (_, end, name, colour) in zip(places, ends, strict=True):
        # In axes coordinates beside the frame, tied to its line where that had to give way.
        axes.annotate(
            name, end, (1.03, place), xycoords="data", textcoords="axes fraction", color=colour,
            va="center", annotation_clip=False, fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 4,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved to be a gap apart by the least squares that this takes.

    >>> spread([0.0, 0.25, 0.25, 1.0], 0.5)
    [-0.375, 0.125, 0.625, 1.125]
    """
    groups: list[list[float]] = []  # of places that touch; each group is centred on their mean
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, gap) + i * gap for group in groups for i in range(len(group))]


def ceilings(axes: Axes, copy: float, products: dict[str, float]) -> None:
    """A roof for each rate of products, GFLOP/s, and the slope of copying below it, GB/s or 0."""
    low, high = axes.get_xlim()
    bottom = axes.get_ylim()[0]
    top = max([axes.get_ylim()[1], *(1.6 * p for p in products.values())])
    if copy and products:
        low = min(low, 0.5 * min(products.values()) / copy)
        high = max(high, 3 * max(products.values()) / copy)
    for name, product in products.items():
        ridge = product / copy if copy else low
        axes.plot([max(ridge, low), high], [product] * 2, color=INK, linewidth=1.0)
        axes.text(high, product, f"{name} product ", ha="right", va="bottom", fontsize=8.5)
    if copy:
        end = max(products.values(), default=top) / copy
        axes.plot([low, end], [low * copy, end * copy], color=INK, linewidth=1.0)
        axes.text(end, end * copy, "copying memory  ", ha="right", va="bottom", fontsize=8.5)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, top)


def row_axis(axes: Axes, names: Sequence[str]) -> None:
    """One named row for each bar, the first at the top, and a grid along their lengths."""
    axes.set_yticks(range(len(names)), list(names))
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
    axes.invert_yaxis()
    axes.grid(False)
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)


def si(value: float) -> str:
    """A number in thousands, millions or billions.

    >>> si(500), si(20_000), si(2.5e6)
    ('500', '20k', '2.5M')
    """
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:g}{prefix}"
    return f"{value:g}"


def _apart(sizes: Sequence[float]) -> list[float]:
    """The sizes whose labels have room beside each other on a log axis, the largest first."""
    span = math.log(sizes[-1] / sizes[0]) or 1.0
    kept: list[float] = []
    for size in reversed(sizes):
        if not kept or math.log(kept[-1] / size) > 0.13 * span:
            kept.append(size)
    return kept[::-1]


def _fraction(axes: Axes, y: float) -> float:
    low, high = axes.get_ylim()
    return math.log(y / low) / math.log(high / low)


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)
