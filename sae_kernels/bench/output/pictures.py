"""The pictures of a run: time by library, by phase and by size, memory, and the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.bench.contestants.clock import PHASES
from sae_kernels.bench.output import series
from sae_kernels.bench.output.ratios import RATES, default, ratio
from sae_kernels.bench.output.series import Lines, label, title, what
from sae_kernels.bench.results import Record, Results, measured, roofs
from sae_kernels.plotting import charts
from sae_kernels.plotting import figure as figures
from sae_kernels.plotting.charts import Line, Spread
from sae_kernels.plotting.figure import Drawing, Picture
from sae_kernels.plotting.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RULE
from sae_kernels.plotting.units import number, si, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

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
_PHASE_COLOURS = {
    "product": (BLUE, "white"), "selection": ("#8fc7ea", INK), "decode": (GREEN, "white"),
    "backward": ("#efb73e", INK), "optimizer": (ORANGE, "white"), "other": ("#c5cad1", INK),
}  # fmt: skip


def draw(results: Results) -> list[Picture]:
    """Draws every picture that the results have points for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return figures.render(drawings(results), "the pictures of a benchmark")


def drawings(results: Results) -> list[Drawing]:
    """The drawings that the results have points for, in the order of the page."""
    found = [headline(shown)] if (shown := series.showpiece(results)) else []
    found += [speed(axis, lines) for axis in "FBK" if (lines := series.lines(results, axis))]
    axis, crossing = series.crossing(results)
    found += [crossover(axis, crossing)] if crossing else []
    found += [memory(lines)] if (lines := series.lines(results, "F", "peak_bytes")) else []
    points = [r for r in measured(results.records) if (r.get("gflops") or 0) > 0 < (r["gbps"] or 0)]
    found += [roofline(points, *roofs(results))] if len(points) > 1 else []
    return found + ([phases(split)] if (split := series.split(results)) else [])


def headline(records: list[Record]) -> Drawing:
    """Bars of the time of each provider in a case, the fastest first."""
    base = default(records)
    assert base is not None
    records = sorted(records, key=lambda r: float(r["median_ms"]))
    texts = [_time(r) + _against(r, base) for r in records]

    def draw(figure: Figure) -> None:
        names = [label(r) + _shipped(r) for r in records]
        values = [_spread(r, lambda r, ms: ms) for r in records]
        colours = [BLUE if r["provider"] == "ours" else "#a3abb5" for r in records]
        axes = charts.bars(figure, names, values, texts, colours, bold=records.index(base))
        axes.set_xlabel("milliseconds: median, whiskers from p20 to p80\n"
                        f"2x: twice the time of {label(base)}")  # fmt: skip
        _head(figure, title(records[0]))

    said = "; ".join(f"{label(r)} {t}" for r, t in zip(records, texts, strict=True))
    caption = f"{records[0]['case']}. Ours is {label(base)} unless it is told otherwise."
    return Drawing("headline", draw, f"Time of a case by library: {said}.", caption)


def _head(figure: Figure, text: str) -> None:
    """Puts a title over the labels too; an axes' own would not fit beside long ones."""
    figure.suptitle(text, x=0.01, horizontalalignment="left")


def phases(records: list[Record]) -> Drawing:
    """Bars of the share of each phase in the time of records of a case."""
    names = [label(r) for r in records]

    def draw(figure: Figure) -> None:
        parts = {p: [float(r["phases_ms"].get(p) or 0) for r in records] for p in PHASES}
        axes = charts.shares(figure, names, parts, _PHASE_COLOURS, [_time(r) for r in records])
        axes.set_xlabel("share of the time, %")
        _head(figure, f"Where the time goes\n{title(records[0])}")

    alt = f"Phases of {records[0]['case']} for {', '.join(names)}."
    return Drawing("phases", draw, alt, f"{records[0]['case']}.")


def speed(axis: str, lines: Lines) -> Drawing:
    """Lines of tokens per second against F, B or K."""
    draw = _against_size(axis, lines, lambda r, ms: 1e3 * r["B"] / ms, "Tokens per second", si)
    alt = f"Tokens per second against {axis}, for {', '.join(lines)}."
    return Drawing(f"speed-{axis}", draw, alt, f"{_fixed(lines, axis)}. Bands: p20 to p80.")


def memory(lines: Lines) -> Drawing:
    """Lines of peak memory against F."""
    draw = _against_size("F", lines, lambda r, ms: float(r["peak_bytes"]), "Peak memory", size, 2)
    alt = f"Peak memory against F, for {', '.join(lines)}."
    return Drawing("memory-F", draw, alt, f"{_fixed(lines, 'F')}.")


def crossover(axis: str, lines: Lines) -> Drawing:
    """A line of our speedup over dense; they are equally fast at 1."""
    (_, mine), *rest = lines.items()
    dense, ours = dict(rest), {record[axis]: record["median_ms"] for record in mine}

    def value(record: Record, ms: float) -> float:
        return ms / float(ours[record[axis]])

    ratios = [value(record, record["median_ms"]) for rs in dense.values() for record in rs]

    def draw(figure: Figure) -> None:
        axes = charts.lines(figure, _lines(dense, lambda r: float(r[axis]), value))
        axes.set_ylim(0.8 * min(1.0, *ratios), 1.3 * max(1.0, *ratios))
        axes.axhline(1, color=INK, linewidth=1.0)
        axes.axhspan(axes.get_ylim()[0], 1, color=RULE, alpha=0.45, linewidth=0)
        axes.annotate("below this line dense is faster", (0, 1), (5, -4), va="top",
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
        charts.finish_sizes(axes, _sizes(axis, lines), lambda value: f"{value:g}x")
        axes.set_xlabel(_AXES[axis])
        axes.set_title("sae-kernels: how many times as fast as dense, log scale")

    alt = f"Time of dense by ours against {axis}, for {', '.join(dense)}."
    caption = f"{_fixed(lines, axis)}. Bands: p20 to p80 of dense, by our median."
    return Drawing("crossover", draw, alt, caption)


def roofline(points: list[Record], copy: float, products: dict[str, float]) -> Drawing:
    """A roofline chart of the achieved FLOP/s of every record."""
    seen: Lines = {}
    for record in points:
        seen.setdefault(label(record), []).append(record)
    achieved = _lines(seen, lambda r: r["gflops"] / r["gbps"], lambda r, ms: float(r["gflops"]))

    def draw(figure: Figure) -> None:
        roofs = {f"{name} product": rate / 1e9 for name, rate in products.items()}
        axes = charts.roofline(figure, achieved, copy / 1e9, "copying memory", roofs)
        axes.set_xlabel("arithmetic intensity, FLOP per byte, log scale")
        axes.set_title("Achieved GFLOP/s, log scale")

    alt = f"Achieved GFLOP/s of {len(points)} measurements against arithmetic intensity."
    caption = (
        "Useful work of a case by its median time. Lines: copying memory and one matrix product, "
        "measured in the same run."
    )
    return Drawing("roofline", draw, alt, caption)


def _against_size(
    axis: str, lines: Lines, value: Value, words: str, text: Callable[[float], str], base: int = 10
) -> Callable[[Figure], None]:
    """Draws each provider's values against a size, with a band from p20 to p80."""
    what_of = what(next(iter(lines.values()))[0]).lower()

    def draw(figure: Figure) -> None:
        axes = charts.lines(figure, _lines(lines, lambda r: float(r[axis]), value))
        charts.finish_sizes(axes, _sizes(axis, lines), text, base)
        axes.set_xlabel(_AXES[axis])
        axes.set_title(f"{words}, log scale: {what_of}")

    return draw


def _lines(lines: Lines, at: Callable[[Record], float], value: Value) -> list[Line]:
    """Lines of a value of records, against another."""
    return [
        Line(name, [at(r) for r in rs], [_spread(r, value) for r in rs], look(rs[0]))
        for name, rs in lines.items()
    ]


def _sizes(axis: str, lines: Lines) -> list[float]:
    return sorted({float(r[axis]) for records in lines.values() for r in records})


def _spread(record: Record, value: Value) -> Spread:
    low, middle, high = (value(record, record[ms]) for ms in ("p20_ms", "median_ms", "p80_ms"))
    return low, middle, high


def look(record: Record) -> dict[str, Any]:
    """Colour and marker of a provider; fp32 has hollow marks and dashes.

    An accelerated library has its own colour and a mark of its level.
    """
    library, _, level = record["provider"].partition("+ours:")
    colour, marker = _LOOKS.get(library, (MUTED, "h"))
    marker = {"module": "p", "trainer": "o"}.get(level, marker)
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


def _fixed(lines: Lines, axis: str) -> str:
    first = next(iter(lines.values()))[0]
    names = [first.get("architecture"), first.get("popularity")]
    sizes = [f"{name} = {first[name]:,}" for name in "BDFK" if name != axis and first.get(name)]
    return ", ".join([*(str(name) for name in names if name), *sizes])


def _time(record: Record) -> str:
    return f"{number(record['median_ms'])} ms"


def _against(record: Record, base: Record) -> str:
    return "" if record is base or record["provider"] in RATES else f", {ratio(record, base)}"


def _shipped(record: Record) -> str:
    other = record["provider"] in ("ours", "dense", "dense_compile", "product")
    return "\nas shipped" if record.get("as_shipped") and not other else ""
