"""Bars of one case: the time of each library, and where it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.bench.contestants.clock import PHASES
from sae_kernels.bench.output.marks import row_axis
from sae_kernels.bench.output.ratios import RATES, default, ratio
from sae_kernels.bench.output.series import label, title
from sae_kernels.report.plots import Drawing
from sae_kernels.report.plotstyle import BLUE, INK, MUTED, ORANGE
from sae_kernels.report.units import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_kernels.bench.results import Record

_PHASE_COLOURS = {
    "product": (BLUE, "white"), "selection": ("#8fc7ea", INK), "decode": ("#00785a", "white"),
    "backward": ("#efb73e", INK), "optimizer": (ORANGE, "white"), "other": ("#c5cad1", INK),
}  # fmt: skip


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
    return Drawing("headline", f"Time of a case by library: {said}.", caption, draw)


def phases(records: list[Record]) -> Drawing:
    """The share of each phase in the time of some records of a case."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = [0.0] * len(records)
        totals = [sum(_milliseconds(r, p) for p in PHASES) or 1.0 for r in records]
        for phase in (p for p in PHASES if any(_milliseconds(r, p) for r in records)):
            colour, ink = _PHASE_COLOURS[phase]
            widths = [
                100 * _milliseconds(r, phase) / t for r, t in zip(records, totals, strict=True)
            ]
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
    return Drawing("phases", alt, f"{records[0]['case']}.", draw)


def _time(record: Record) -> str:
    return f"{number(record['median_ms'])} ms"


def _against(record: Record, base: Record) -> str:
    return "" if record is base or record["provider"] in RATES else f", {ratio(record, base)}"


def _shipped(record: Record) -> str:
    other = record["provider"] in ("ours", "dense", "dense_compile", "product")
    return "\nas shipped" if record.get("as_shipped") and not other else ""


def _milliseconds(record: Record, phase: str) -> float:
    value: Any = record["phases_ms"].get(phase)
    return float(value or 0.0)
