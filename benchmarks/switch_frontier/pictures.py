"""The pictures: FVU against L0, and against what training has cost so far."""

from __future__ import annotations

import io
import math
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.switch_frontier.tables import TITLES, by_shape, experts, ks, mean, shown_k
from sae_kernels.report.plotstyle import BLUE, INK, ORANGE, house_style

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from benchmarks.switch_frontier.runs import Record

_LOOKS = ((BLUE, "o"), ("#00785a", "v"), ("#a3457a", "s"), (ORANGE, "D"))
_FINE = tuple(n / 10 for n in range(10, 100, 2))
_TICKS = ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8), _FINE)
_COSTS = {
    "flops": (1e12, "training so far, TFLOP, log scale"),
    "seconds": (1.0, "training so far, seconds, log scale"),
}
_FROM = 0.02
"""The part of the steps that pictures of costs leave out: nothing is learnt yet, much warmed up."""


def draw(records: list[Record]) -> dict[str, bytes]:
    """PNG files by name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with house_style("the pictures of the frontier"):
        costs = {f"switch-{cost}": _panels(records, _cost(cost)) for cost in _COSTS}
        return {"switch-frontier": _panels(records, _frontier), **costs}


def _panels(records: list[Record], fill: Callable[[Axes, list[Record], str], None]) -> bytes:
    """A panel for each arm, with TopK in both, and one legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [arm for arm in TITLES if experts(records, arm)]
    figure = Figure(figsize=(1.0 + 4.2 * len(arms), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    for panel, arm in zip(axes, arms, strict=True):
        fill(panel, records, arm)
        panel.set_title("At equal width" if arm == "width" else "At equal FLOPs")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("FVU, log scale")
    _ticks(axes[0].yaxis, *axes[0].get_ylim())
    _legend(figure, axes)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200, facecolor="white")
    return png.getvalue()


def _frontier(axes: Axes, records: list[Record], arm: str) -> None:
    """Held-out FVU against L0."""
    from matplotlib.ticker import NullLocator

    found, every = by_shape(records), ks(records)
    for one, n in _lines(records, arm):
        groups = [found[one, n, k] for k in every if (one, n, k) in found]
        l0 = [mean(runs, "l0") for runs in groups]
        _line(axes, l0, [[r["fvu"] for r in runs] for runs in groups], records, n, marked=True)
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(k) for k in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("L0 on held-out tokens, log scale")


def _cost(cost: str) -> Callable[[Axes, list[Record], str], None]:
    unit, words = _COSTS[cost]

    def fill(axes: Axes, records: list[Record], arm: str) -> None:
        """FVU of the training batches against a cost."""
        found, k = by_shape(records), shown_k(records)
        for one, n in _lines(records, arm):
            curves = [_learning(record) for record in found.get((one, n, k), [])]
            points = list(zip(*curves, strict=True))
            x = [statistics.fmean(p[cost] for p in point) / unit for point in points]
            _line(axes, x, [[p["fvu"] for p in point] for point in points], records, n)
        axes.set_xscale("log")
        axes.set_xlabel(f"{words} (k = {k})")
        _ticks(axes.xaxis, *axes.get_xlim())

    return fill


def _learning(record: Record) -> list[Record]:
    return [point for point in record["curve"] if point["step"] >= _FROM * record["steps"]]


def _lines(records: list[Record], arm: str) -> list[tuple[str, int]]:
    return [("base", 1), *((arm, n) for n in experts(records, arm))]


def _line(
    axes: Axes,
    x: list[float],
    y: list[list[float]],
    records: list[Record],
    n: int,
    marked: bool = False,
) -> None:
    """The mean over seeds, and a band from the least to the largest."""
    looks = _look(records, n)
    if not marked:
        looks["marker"] = ""
    axes.plot(x, [statistics.fmean(each) for each in y], markersize=4.5, **looks)
    low, high = [min(each) for each in y], [max(each) for each in y]
    axes.fill_between(x, low, high, color=looks["color"], alpha=0.15, linewidth=0)


def _look(records: list[Record], n: int) -> dict[str, Any]:
    if n == 1:
        return {"color": INK, "marker": "^", "linestyle": (0, (5, 2)), "label": "TopK", "zorder": 4}
    every = sorted({record["n_experts"] for record in records} - {1})
    colour, marker = _LOOKS[every.index(n) % len(_LOOKS)]
    return {"color": colour, "marker": marker, "label": f"Switch, {n} experts"}


def _ticks(axis: Axis, low: float, high: float) -> None:
    """Round numbers on a log axis, as few as make at least four."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for subs in _TICKS:
        values = [sub * 10.0**decade for decade in decades for sub in subs]
        shown = [value for value in values if low <= value <= high]
        if len(shown) >= 4:
            break
    axis.set_major_locator(FixedLocator(shown))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(figure: Figure, axes: Any) -> None:
    handles = {line.get_label(): line for panel in axes for line in panel.get_lines()}
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False
    )
