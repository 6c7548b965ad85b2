"""Axes, ticks and labels that all pictures share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_kernels.plotting.style import BLUE, INK, MUTED
from sae_kernels.plotting.units import percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from torch import Tensor

# Multiples of powers of ten that a log axis may be labelled at, from few to many.
_ROUND = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8),
          tuple(n / 10 for n in range(10, 100, 2)))  # fmt: skip


def line(
    axes: Axes, steps: Sequence[int], values: Sequence[float], text: Callable[[float], str]
) -> None:
    """Draws a curve with its last value at its end, or notes that it has no finite values."""
    points = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    if not points:
        empty(axes)
        return
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=BLUE, marker="o" if len(points) == 1 else "", clip_on=False)
    axes.annotate(
        text(points[-1][1]), points[-1], (9, 0), color=BLUE, va="center", weight="bold",
        textcoords="offset points", annotation_clip=False,
    )  # fmt: skip


def band(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    between: tuple[Sequence[float], Sequence[float]] | None,
    **look: Any,
) -> None:
    """Draws a line and, lightly shaded, the band between two others."""
    axes.plot(x, y, **look)
    if between is not None:
        axes.fill_between(x, *between, color=look["color"], alpha=0.15, linewidth=0)


def empty(axes: Axes) -> None:
    """Writes into an empty plot why it is empty."""
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.grid(False)
    axes.text(0.5, 0.5, "no finite values", color=MUTED, transform=axes.transAxes,
              ha="center", va="center")  # fmt: skip


def step_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Labels the x axis as training steps, whole numbers only."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if len(set(steps)) > 1:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axes.set_xticks([*set(steps)])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("training step")
    axes.margins(x=0.02)


def percent_axis(axes: Axes, label: str = "") -> None:
    """Labels the y axis in percent."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.set_ylabel(label)


def count_axis(axes: Axes, values: Tensor, quantity: str) -> None:
    """Finishes a histogram of latents, naming any values that could not be drawn."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    top = axes.get_ylim()[1]
    # Room above the tallest bar for the labels written there.
    axes.set_ylim(0, max(1.22 * top, 1))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("latents")
    missing = int((~values.isfinite()).sum())
    axes.set_xlabel(f"{quantity} ({missing:,} not finite)" if missing else quantity)
    if not len(values) - missing:
        empty(axes)


def row_axis(axes: Axes, names: Sequence[str]) -> None:
    """Gives each horizontal bar a named row, the first at the top, and draws a grid along them."""
    axes.set_yticks(range(len(names)), list(names))
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
    axes.invert_yaxis()
    axes.grid(False)
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)


def log_ticks(
    axis: Axis, text: Callable[[float], str] = lambda value: f"{value:,g}", base: int = 10
) -> None:
    """Labels a log axis at round numbers, as few as make at least four, or at powers of two.

    Call it when the limits are final.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axis.get_view_interval()
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    for multiples in _ROUND if base == 10 else _ROUND[:1]:
        values = [multiple * float(base) ** power for power in powers for multiple in multiples]
        shown = [value for value in values if low <= value <= high]
        if len(shown) >= 4:
            break
    axis.set_major_locator(FixedLocator(shown[:: math.ceil(len(shown) / 9)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def size_ticks(axis: Axis, sizes: Sequence[float]) -> None:
    """Labels a log axis at the measured sizes, the largest first if there is too little room."""
    from matplotlib.ticker import NullLocator

    span = math.log(sizes[-1] / sizes[0]) or 1.0
    shown: list[float] = []
    for size in reversed(sizes):
        if not shown or math.log(shown[-1] / size) > 0.13 * span:
            shown.append(size)
    axis.set_ticks(shown, [f"{size:,g}" for size in shown])
    axis.set_minor_locator(NullLocator())


def end_labels(axes: Axes) -> None:
    """Names every line beside its right end, moved up or down where two would overlap.

    The y axis must be logarithmic and its limits final.
    """
    low, high = axes.get_ylim()
    ends = []
    for drawn in axes.get_lines():
        name = str(drawn.get_label())
        if not name.startswith("_"):
            x, y = (float(np.asarray(data)[-1]) for data in drawn.get_data())
            height = math.log(y / low) / math.log(high / low)
            ends.append((height, (x, y), name, drawn.get_color()))
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
    """Moves ascending positions to be at least a gap apart, least squares from where they were.

    >>> spread([0.0, 0.25, 0.25, 1.0], 0.5)
    [-0.375, 0.125, 0.625, 1.125]
    """
    groups: list[list[float]] = []  # of places that touch; each group is centred on their mean

    def bottom(group: list[float]) -> float:
        return sum(group) / len(group) - gap * (len(group) - 1) / 2

    for place in places:
        groups.append([place])
        while len(groups) > 1 and bottom(groups[-2]) + gap * len(groups[-2]) > bottom(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [bottom(group) + i * gap for group in groups for i in range(len(group))]
