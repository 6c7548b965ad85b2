"""The pictures of an analysis: one panel per SAE, on common axes."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sae_kernels.analyze.frontier import frontiers
from sae_kernels.analyze.geometry import CURVE, duplicate_curve, median
from sae_kernels.plotting import figure as figures
from sae_kernels.plotting.axes import count_axis, percent_axis
from sae_kernels.plotting.figure import Drawing, Picture
from sae_kernels.plotting.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE
from sae_kernels.plotting.units import number, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sae_kernels.analyze.analysis import Analysis
    from sae_kernels.analyze.frontier import Frontier

    Named = TypeVar("Named", Analysis, Frontier)

_WIDTH, _PANEL = 6.0, 2.3  # inches; of a figure, and the height of a panel
_BINS, _TITLE = 50, 60
_NUMBERED = 16  # layers of which the shares are written as numbers
_COLOURS = (INK, BLUE, ORANGE, GREEN, PURPLE, MUTED)  # of lines that are compared


def check_drawable() -> None:
    """Raises ImportError if :func:`draw` would, before any work is done."""
    figures.render([], "the pictures of an analysis")


def draw(analyses: Sequence[Analysis]) -> list[Picture]:
    """Draws nearest neighbours, duplicates and, if there are any, experts, layers and frontiers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    used = [each for each in analyses if each.use is not None]
    spread = [each for each in analyses if each.spread is not None]
    compared = frontiers(analyses)
    kinds = [cosines for each in analyses for _, _, cosines in _kinds(each)]
    cosines = torch.cat([torch.zeros(1), *kinds])
    lowest = float(cosines[cosines.isfinite()].min())
    highest = max(max(duplicate_curve(cosines)) for cosines in kinds)
    drawings = [
        _drawing("neighbours", analyses, partial(neighbours_panel, low=lowest)),
        _drawing("duplicates", analyses, partial(duplicates_panel, high=highest)),
    ]
    if used:
        drawings.append(_drawing("experts", used, load_panel))
    if spread:
        drawings.append(_drawing("layers", spread, layers_panel))
    if compared:
        drawings.append(_drawing("frontiers", compared, frontier_panel))
    return figures.render(drawings, "the pictures of an analysis")


def _drawing(name: str, shown: Sequence[Named], panel: Callable[[Axes, Named], None]) -> Drawing:
    """A drawing with one panel per SAE or frontier, stacked vertically."""

    def draw(figure: Figure) -> None:
        figure.set_size_inches(_WIDTH, 0.3 + _PANEL * len(shown))
        for axes, each in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
            panel(axes, each)
            # A name may hold "$".
            axes.set_title(_title(each.name), parse_math=False)

    return Drawing(name, draw)


def _title(name: str) -> str:
    """A panel title: the end of a long name, without lone surrogates."""
    name = name.encode("utf-8", "replace").decode()
    return name if len(name) <= _TITLE else f"…{name[1 - _TITLE :]}"


def _kinds(analysis: Analysis) -> list[tuple[str, str, torch.Tensor]]:
    """The sets of cosines to draw for an SAE, each with a name and a colour."""
    shape = analysis.geometry
    if analysis.n_experts == 1:
        return [("any other latent", INK, shape.nearest.cpu())]
    return [
        ("in the same expert", BLUE, shape.within.cpu()),
        ("in other experts", ORANGE, shape.across.cpu()),
    ]


def neighbours_panel(axes: Axes, analysis: Analysis, low: float) -> None:
    """A histogram of each latent's largest cosine to another row."""
    edges = torch.linspace(low, 1, _BINS + 1, dtype=torch.float64)
    for name, colour, cosines in _kinds(analysis):
        counts = torch.histc(cosines[cosines.isfinite()].double(), _BINS, low, 1)
        label = f"{name}, median {number(median(cosines))}"
        filled = counts.nonzero()[:, 0].tolist() or [0]
        shown = slice(filled[0], filled[-1] + 1)  # no line along the axis where nothing is
        steps = counts[shown].tolist(), edges[filled[0] : filled[-1] + 2].tolist()
        axes.stairs(*steps, fill=True, color=colour, alpha=0.15)
        axes.stairs(*steps, color=colour, linewidth=1.5, label=label)
    axes.margins(y=0.12)  # with what count_axis leaves, room for the legend
    axes.set_ylim(0, None)
    count_axis(axes, analysis.geometry.nearest, f"largest cosine to another {analysis.side} row")
    axes.set_xlim(low, 1)
    _legend(axes)


def duplicates_panel(axes: Axes, analysis: Analysis, high: float) -> None:
    """The share of latents with a neighbour at or above each cosine."""
    threshold = analysis.geometry.threshold
    axes.axvline(threshold, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    for name, colour, cosines in _kinds(analysis):
        (part,) = duplicate_curve(cosines, (threshold,))
        label = f"{name}, {percent(part)} from {threshold:g} on"
        look: dict[str, Any] = {"color": colour, "marker": ".", "zorder": 3, "clip_on": False}
        axes.plot(CURVE, duplicate_curve(cosines), label=label, **look)
    axes.set_xlim(min(CURVE[0], threshold) - 0.01, 1)
    axes.set_ylim(0, max(1.35 * high, 0.01))
    percent_axis(axes, "latents")
    axes.set_xlabel("with a neighbour at or above this cosine")
    _legend(axes)


def load_panel(axes: Axes, analysis: Analysis) -> None:
    """The share of tokens that each expert has."""
    from matplotlib.ticker import MaxNLocator

    use = analysis.use
    assert use is not None
    n = len(use.load)
    experts = range(analysis.shared, analysis.shared + n)
    axes.bar(experts, use.load.tolist(), color=BLUE, width=0.8)
    axes.axhline(1 / n, color=ORANGE, linewidth=1.2, linestyle=(0, (4, 3)))
    percent_axis(axes, "tokens")
    even = f"as even as {number(use.effective_experts)} equally busy ones"
    axes.set_xlabel(f"expert (dashed: 1/{n}; {even})")
    axes.set_xlim(experts[0] - 0.6, experts[-1] + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))


def layers_panel(axes: Axes, analysis: Analysis) -> None:
    """The share of each layer in the latents' squared decoder norms, a row per layer read."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    spread = analysis.spread
    assert spread is not None
    share, most = spread.share, float(spread.share.max().clamp(min=0.01))
    colours = LinearSegmentedColormap.from_list("share", ["white", BLUE])
    axes.imshow(share.numpy(), cmap=colours, vmin=0, vmax=most, aspect="auto")
    if share.shape[1] <= _NUMBERED:
        for (source, layer), value in zip(
            itertools.product(*map(range, share.shape)), share.flatten().tolist(), strict=True
        ):
            colour = "white" if value > most / 2 else INK
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(layer, source, f"{100 * value:.0f}", color=colour, **look)
    live = spread.effective[spread.effective > 0]
    mean = number(float(live.mean())) if len(live) else "none"
    axes.set_xlabel(f"layer that is written: % of the squared norm (spread over {mean} on average)")
    axes.set_ylabel("layer that is read")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(share) == 1:
        axes.set_yticks([0], ["all"])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def frontier_panel(axes: Axes, frontier: Frontier) -> None:
    """FVU against L0, a line for each kind."""
    seen: list[float] = []
    for (name, analyses), colour in zip(frontier.kinds.items(), itertools.cycle(_COLOURS)):
        measured = [each.evaluation for each in analyses if each.evaluation is not None]
        l0, fvu = [each.l0 for each in measured], [each.fvu for each in measured]
        axes.plot(l0, fvu, marker="o", markersize=4, label=name, color=colour)
        seen += l0
    room = max(1.0, 0.08 * (max(seen) - min(seen)))
    axes.set_xlim(min(seen) - room, max(seen) + room)
    axes.margins(y=0.15)
    axes.set_ylim(0, None)
    axes.set_xlabel("L0")
    axes.set_ylabel("FVU")
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=1,
        fontsize="small", labelcolor="linecolor", handlelength=1.2,
    )  # fmt: skip
