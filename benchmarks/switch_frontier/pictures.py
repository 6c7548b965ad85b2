"""The pictures: FVU against L0, and against what training has cost so far."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.switch_frontier.tables import TITLES, by_shape, experts, ks, lines, mean, shown_k
from sae_kernels.plotting import figure as figures
from sae_kernels.plotting.axes import band, log_ticks
from sae_kernels.plotting.figure import Drawing, Picture
from sae_kernels.plotting.style import BLUE, GREEN, INK, ORANGE, PURPLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.study import Record

    _Fill = Callable[[Axes, list[Record], str], None]

_LOOKS = ((BLUE, "o"), (GREEN, "v"), (PURPLE, "s"), (ORANGE, "D"))
_COSTS = {
    "flops": (1e12, "training so far, TFLOP, log scale"),
    "seconds": (1.0, "training so far, seconds, log scale"),
}
_FROM = 0.02
"""The part of the steps that pictures of costs leave out: nothing is learnt yet, much warmed up."""


def draw(records: list[Record]) -> list[Picture]:
    """FVU on held-out tokens against L0, and of training batches against FLOPs and seconds.

    Raises:
        ImportError: matplotlib is not installed.
    """
    fills: dict[str, _Fill] = {
        "frontier": _frontier,
        **{cost: partial(_cost, cost) for cost in _COSTS},
    }
    drawings = (Drawing(f"switch-{n}", partial(_panels, records, f)) for n, f in fills.items())
    return figures.render(drawings, "the pictures of the frontier")


def _panels(records: list[Record], fill: _Fill, figure: Figure) -> None:
    """A panel for each arm, with TopK in both, and one legend."""
    arms = [arm for arm in TITLES if experts(records, arm)]
    figure.set_size_inches(1.0 + 4.2 * len(arms), 4.2)
    axes = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    for panel, arm in zip(axes, arms, strict=True):
        fill(panel, records, arm)
        panel.set_title("At equal width" if arm == "width" else "At equal FLOPs")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("FVU, log scale")
    log_ticks(axes[0].yaxis)
    handles = {line.get_label(): line for panel in axes for line in panel.get_lines()}
    place: Any = "outside lower center"
    figure.legend(handles.values(), handles, loc=place, ncols=len(handles), frameon=False)


def _frontier(axes: Axes, records: list[Record], arm: str) -> None:
    """Held-out FVU against L0."""
    from matplotlib.ticker import NullLocator

    found, every = by_shape(records), ks(records)
    for one, n in lines(records, arm):
        groups = [found[one, n, k] for k in every if (one, n, k) in found]
        l0 = [mean(runs, "l0") for runs in groups]
        _line(axes, l0, [[r["fvu"] for r in runs] for runs in groups], _look(records, n))
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(k) for k in every])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("L0 on held-out tokens, log scale")


def _cost(cost: str, axes: Axes, records: list[Record], arm: str) -> None:
    """FVU of the training batches against a cost."""
    unit, words = _COSTS[cost]
    found, k = by_shape(records), shown_k(records)
    for one, n in lines(records, arm):
        runs = found.get((one, n, k), [])
        curves = ([p for p in r["curve"] if p["step"] >= _FROM * r["steps"]] for r in runs)
        points = list(zip(*curves, strict=True))
        x = [statistics.fmean(p[cost] for p in point) / unit for point in points]
        fvu = [[p["fvu"] for p in point] for point in points]
        _line(axes, x, fvu, {**_look(records, n), "marker": ""})
    axes.set_xscale("log")
    axes.set_xlabel(f"{words} (k = {k})")
    log_ticks(axes.xaxis)


def _line(axes: Axes, x: list[float], y: list[list[float]], look: dict[str, Any]) -> None:
    """The mean over seeds, and a band from the least to the largest."""
    means, between = list(map(statistics.fmean, y)), (list(map(min, y)), list(map(max, y)))
    band(axes, x, means, between, markersize=4.5, **look)


def _look(records: list[Record], n: int) -> dict[str, Any]:
    if n == 1:
        return {"color": INK, "marker": "^", "linestyle": (0, (5, 2)), "label": "TopK", "zorder": 4}
    every = sorted({record["n_experts"] for record in records} - {1})
    colour, marker = _LOOKS[every.index(n) % len(_LOOKS)]
    return {"color": colour, "marker": marker, "label": f"Switch, {n} experts"}
