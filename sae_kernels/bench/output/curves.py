"""What changes with the size of a case: speed, memory and the ratio to dense; and the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.bench.output.cells import size
from sae_kernels.bench.output.series import label, what
from sae_kernels.plotting.axes import band, end_labels, log_ticks, size_ticks
from sae_kernels.plotting.figure import Drawing
from sae_kernels.plotting.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RULE

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sae_kernels.bench.output.series import Lines
    from sae_kernels.bench.results import Record

    Value = Callable[[Record, float], float]  # of a record and one of its times

_AXES = {
    "F": "n_latents F, log scale",
    "B": "tokens per batch B, log scale",
    "K": "latents kept per token K, log scale",
}
_LOOKS = {
    "ours": (BLUE, "o"), "dense": (MUTED, "s"), "dense_compile": (INK, "D"),
    "sparsify": (ORANGE, "^"), "dictionary_learning": (GREEN, "v"), "sae_lens": (PURPLE, "P"),
    "cusparse": ("#2f7fb0", "X"), "product": ("#8a6d00", "*"),
}  # fmt: skip


def speed(axis: str, lines: Lines) -> Drawing:
    """Tokens per second against F, B or K."""

    def draw(figure: Figure) -> None:
        axes = _lines(figure, lines, axis, lambda r, ms: 1e3 * r["B"] / ms)
        _finish(axes, lines, axis, f"Tokens per second, log scale: {_kind(lines)}", si)

    alt = f"Tokens per second against {axis}, for {', '.join(lines)}."
    return Drawing(f"speed-{axis}", draw, alt, f"{_fixed(lines, axis)}. Bands: p20 to p80.")


def crossover(axis: str, lines: Lines) -> Drawing:
    """How many times as fast ours, the first line, is as dense; 1 is where they cross."""
    (_, mine), *rest = lines.items()
    dense, ours = dict(rest), {record[axis]: record["median_ms"] for record in mine}

    def against_ours(record: Record, ms: float) -> float:
        return ms / float(ours[record[axis]])

    ratios = [against_ours(record, record["median_ms"]) for rs in dense.values() for record in rs]

    def draw(figure: Figure) -> None:
        axes = _lines(figure, dense, axis, against_ours)
        axes.set_ylim(0.8 * min(1.0, *ratios), 1.3 * max(1.0, *ratios))
        axes.axhline(1, color=INK, linewidth=1.0)
        axes.axhspan(axes.get_ylim()[0], 1, color=RULE, alpha=0.45, linewidth=0)
        axes.annotate("below this line dense is faster", (0, 1), (5, -4), va="top",
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
        heading = "sae-kernels: how many times as fast as dense, log scale"
        _finish(axes, lines, axis, heading, lambda value: f"{value:g}x")

    alt = f"Time of dense by ours against {axis}, for {', '.join(dense)}."
    caption = f"{_fixed(lines, axis)}. Bands: p20 to p80 of dense, by our median."
    return Drawing("crossover", draw, alt, caption)


def memory(lines: Lines) -> Drawing:
    """Peak memory against F."""

    def draw(figure: Figure) -> None:
        axes = _lines(figure, lines, "F", lambda r, ms: r["peak_bytes"])
        _finish(axes, lines, "F", f"Peak memory, log scale: {_kind(lines)}", size, base=2)

    alt = f"Peak memory against F, for {', '.join(lines)}."
    return Drawing("memory-F", draw, alt, f"{_fixed(lines, 'F')}.")


def roofline(points: list[Record], copy: float, products: dict[str, float]) -> Drawing:
    """Achieved FLOP/s of every record, under its machine's roofs in bytes/s and FLOP/s."""
    seen: dict[str, list[Record]] = {}
    for record in points:
        seen.setdefault(label(record), []).append(record)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for name, records in seen.items():
            x = [r["gflops"] / r["gbps"] for r in records]
            look = {**_look(records[0]), "linestyle": ""}
            axes.plot(x, [r["gflops"] for r in records], label=name, **look)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _ceilings(axes, copy / 1e9, {name: rate / 1e9 for name, rate in products.items()})
        log_ticks(axes.xaxis)
        log_ticks(axes.yaxis)
        axes.set_xlabel("arithmetic intensity, FLOP per byte, log scale")
        axes.set_title("Achieved GFLOP/s, log scale")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)

    alt = f"Achieved GFLOP/s of {len(points)} measurements against arithmetic intensity."
    caption = (
        "Useful work of a case by its median time. Lines: copying memory and one matrix product, "
        "measured in the same run."
    )
    return Drawing("roofline", draw, alt, caption)


def si(value: float) -> str:
    """A number in thousands, millions or billions.

    >>> si(500), si(20_000), si(2.5e6)
    ('500', '20k', '2.5M')
    """
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:g}{prefix}"
    return f"{value:g}"


def _look(record: Record) -> dict[str, Any]:
    """Colour and marker of a provider; fp32 has hollow marks and dashes."""
    colour, marker = _LOOKS.get(record["provider"], (MUTED, "h"))
    ours, hollow = record["provider"] == "ours", record["dtype"] == "float32"
    return {
        "color": colour,
        "marker": marker,
        "markersize": 5.5 if ours else 4.5,
        "linewidth": 2.2 if ours else 1.3,
        "linestyle": (0, (5, 2)) if hollow else "-",
        "markerfacecolor": "white" if hollow else colour,
        "zorder": 4 if ours else 3,
    }


def _lines(figure: Figure, lines: Lines, axis: str, value: Value) -> Axes:
    """A line for each provider, of a value at each size, and its band from p20 to p80."""
    axes = figure.subplots()
    for name, records in lines.items():
        low, y, high = (
            [value(r, r[time]) for r in records] for time in ("p20_ms", "median_ms", "p80_ms")
        )
        x = [float(r[axis]) for r in records]
        band(axes, x, y, (low, high), label=name, **_look(records[0]))
    return axes


def _finish(
    axes: Axes, lines: Lines, axis: str, heading: str, text: Callable[[float], str], base: int = 10
) -> None:
    """Log scales with the measured sizes below, a title, and a name at the end of each line."""
    axes.set_xscale("log")
    axes.set_yscale("log", base=base)
    log_ticks(axes.yaxis, text, base)
    size_ticks(axes.xaxis, sorted({float(r[axis]) for rs in lines.values() for r in rs}))
    axes.set_xlabel(_AXES[axis])
    axes.set_title(heading)
    end_labels(axes)


def _ceilings(axes: Axes, copy: float, products: dict[str, float]) -> None:
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


def _kind(lines: Lines) -> str:
    return what(next(iter(lines.values()))[0]).lower()


def _fixed(lines: Lines, axis: str) -> str:
    first = next(iter(lines.values()))[0]
    names = [first.get("architecture"), first.get("popularity")]
    sizes = [f"{name} = {first[name]:,}" for name in "BDFK" if name != axis and first.get(name)]
    return ", ".join([*(str(name) for name in names if name), *sizes])
