"""Colours, type and axis habits that all figures of a report share."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from matplotlib.axes import Axes
    from torch import Tensor

INK, MUTED, RULE, BLUE, ORANGE = "#1f2328", "#59606a", "#d9dde2", "#0072b2", "#bf5000"
"""Figure colours; blue against orange stays apart for every common colour blindness."""

CSS_NAMES = {INK: "ink", "#000000": "ink", MUTED: "muted", RULE: "rule", BLUE: "blue",
              ORANGE: "orange"}  # fmt: skip

STYLE: dict[Any, Any] = {
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.5,
    # Text stays text, so the page's own font applies and a reader can search and copy it.
    "svg.fonttype": "none",
}


@contextmanager
def house_style(what: str) -> Iterator[None]:
    """matplotlib with these settings; without it an error that says what needs it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f'{what} need matplotlib: pip install "sae-kernels[report]"') from error
    with matplotlib.rc_context(STYLE):
        yield


def line(
    axes: Axes, steps: Sequence[int], values: Sequence[float], text: Callable[[float], str]
) -> None:
    """Draw a curve and write its last value beside its end; says so if there is none."""
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


def empty(axes: Axes) -> None:
    """Say in an empty plot that it is empty on purpose."""
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.grid(False)
    axes.text(0.5, 0.5, "no finite values", color=MUTED, transform=axes.transAxes,
              ha="center", va="center")  # fmt: skip


def step_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Label the x axis as training steps, whole numbers only."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if len(set(steps)) > 1:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axes.set_xticks([*set(steps)])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("training step")
    axes.margins(x=0.02)


def log_ticks(axes: Axes) -> None:
    """Label a log y axis in plain numbers, also when it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def count_axis(axes: Axes, values: Tensor, quantity: str) -> None:
    """Finish a histogram of latents, naming any values that could not be drawn."""
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
