"""The pictures of a run: the time of each library, where it goes, and how it changes with sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.bench.contestants.clock import PHASES
from sae_kernels.bench.output import curves, series
from sae_kernels.bench.output.ratios import RATES, default, ratio
from sae_kernels.bench.output.series import label, title
from sae_kernels.bench.results import measured, roofs
from sae_kernels.plotting import figure as figures
from sae_kernels.plotting.axes import row_axis
from sae_kernels.plotting.figure import Drawing, Picture
from sae_kernels.plotting.style import BLUE, GREEN, INK, MUTED, ORANGE
from sae_kernels.plotting.units import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_kernels.bench.results import Record, Results

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
    """What can be drawn, in the order of the page."""
    found = []
    if shown := series.showpiece(results):
        found.append(headline(shown))
    found += [curves.speed(axis, lines) for axis in "FBK" if (lines := series.lines(results, axis))]
    axis, crossing = series.crossing(results)
    if crossing:
        found.append(curves.crossover(axis, crossing))
    if memory := series.lines(results, "F", "peak_bytes"):
        found.append(curves.memory(memory))
    points = [r for r in measured(results.records) if (r.get("gflops") or 0) > 0 < (r["gbps"] or 0)]
    if len(points) > 1:
        found.append(curves.roofline(points, *roofs(results)))
    if split := series.split(results):
        found.append(phases(split))
    return found


def headline(records: list[Record]) -> Drawing:
    """The time of each record of a case, the fastest first; one of them is ours."""
    base = default(records)
    assert base is not None
    records = sorted(records, key=lambda r: float(r["median_ms"]))
    texts = [_time(r) + _against(r, base) for r in records]

    def draw(figure: Figure) -> None:
        figure.set_figheight(max(figure.get_figheight(), 1 + 0.4 * len(records)))
        axes = figure.subplots()
        medians = [r["median_ms"] for r in records]
        whiskers = (
            [max(0, r["median_ms"] - r["p20_ms"]) for r in records],
            [max(0, r["p80_ms"] - r["median_ms"]) for r in records],
        )
        colours = [BLUE if r["provider"] == "ours" else "#a3abb5" for r in records]
        axes.barh(range(len(records)), medians, 0.7, color=colours, xerr=whiskers,
                  error_kw={"ecolor": MUTED, "elinewidth": 1.0})  # fmt: skip
        for i, (record, text) in enumerate(zip(records, texts, strict=True)):
            axes.annotate(text, (max(record["p80_ms"], record["median_ms"]), i), (5, 0),
                          textcoords="offset points", va="center",
                          weight="bold" if record is base else "normal")  # fmt: skip
        row_axis(axes, [label(r) + _shipped(r) for r in records])
        axes.set_xlim(0, 1.4 * max(r["p80_ms"] for r in records))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(False)  # the times are written out, and lines would run through them
        axes.set_xlabel("milliseconds: median, whiskers from p20 to p80\n"
                        f"2x: twice the time of {label(base)}")  # fmt: skip
        axes.set_title(title(records[0]))

    said = "; ".join(f"{label(r)} {t}" for r, t in zip(records, texts, strict=True))
    caption = f"{records[0]['case']}. Ours is {label(base)} unless it is told otherwise."
    return Drawing("headline", draw, f"Time of a case by library: {said}.", caption)


def phases(records: list[Record]) -> Drawing:
    """The share of each phase in the time of some records of a case."""
    times = {p: [float(r["phases_ms"].get(p) or 0) for r in records] for p in PHASES}
    totals = [sum(of_one) or 1.0 for of_one in zip(*times.values(), strict=True)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = [0.0] * len(records)
        for phase in (p for p in PHASES if any(times[p])):
            colour, ink = _PHASE_COLOURS[phase]
            widths = [100 * ms / total for ms, total in zip(times[phase], totals, strict=True)]
            bars = axes.barh(range(len(records)), widths, 0.7, left, color=colour, label=phase)
            texts = [f"{w:.0f}" if w >= 4 else "" for w in widths]
            axes.bar_label(bars, texts, label_type="center", color=ink)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for i, record in enumerate(records):
            axes.annotate(_time(record), (100, i), (5, 0), va="center",
                          textcoords="offset points", annotation_clip=False)  # fmt: skip
        row_axis(axes, [label(r) for r in records])
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the time, %")
        axes.set_title(f"Where the time goes\n{title(records[0])}")
        figure.legend(loc="outside lower center", ncols=6, frameon=False, columnspacing=1.0,
                      handlelength=1.0)  # fmt: skip

    alt = f"Phases of {records[0]['case']} for {', '.join(map(label, records))}."
    return Drawing("phases", draw, alt, f"{records[0]['case']}.")


def _time(record: Record) -> str:
    return f"{number(record['median_ms'])} ms"


def _against(record: Record, base: Record) -> str:
    return "" if record is base or record["provider"] in RATES else f", {ratio(record, base)}"


def _shipped(record: Record) -> str:
    other = record["provider"] in ("ours", "dense", "dense_compile", "product")
    return "\nas shipped" if record.get("as_shipped") and not other else ""
