"""What changes with the size of a case: speed, memory and the ratio to dense; and the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.bench.output.cells import size
from sae_kernels.bench.output.marks import ceilings, end_labels, line, log_axes, si
from sae_kernels.bench.output.series import label, what
from sae_kernels.report.plots import Drawing
from sae_kernels.report.plotstyle import INK, RULE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_kernels.bench.output.series import Lines
    from sae_kernels.bench.results import Record

_AXES = {
    "F": "n_latents F, log scale",
    "B": "tokens per batch B, log scale",
    "K": "latents kept per token K, log scale",
}


def speed(axis: str, lines: Lines) -> Drawing:
    """Tokens per second against F, B or K."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for records in lines.values():
            line(axes, records, axis, lambda r, ms: 1e3 * r["B"] / ms)
        log_axes(axes, _sizes(lines, axis), si)
        axes.set_xlabel(_AXES[axis])
        axes.set_title(f"Tokens per second, log scale: {_kind(lines)}")
        end_labels(axes)

    alt = f"Tokens per second against {axis}, for {', '.join(lines)}."
    return Drawing(f"speed-{axis}", alt, f"{_fixed(lines, axis)}. Bands: p20 to p80.", draw)


def crossover(axis: str, lines: Lines) -> Drawing:
    """How many times as fast ours, the first line, is as dense; 1 is where they cross."""
    mine, *dense = lines.values()
    ours = {record[axis]: record["median_ms"] for record in mine}

    def against_ours(record: Record, ms: float) -> float:
        return ms / float(ours[record[axis]])

    ratios = [against_ours(record, record["median_ms"]) for rs in dense for record in rs]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for records in dense:
            line(axes, records, axis, against_ours)
        axes.set_ylim(0.8 * min(1.0, *ratios), 1.3 * max(1.0, *ratios))
        axes.axhline(1, color=INK, linewidth=1.0)
        axes.axhspan(axes.get_ylim()[0], 1, color=RULE, alpha=0.45, linewidth=0)
        axes.annotate("below this line dense is faster", (0, 1), (5, -4), va="top",
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
        log_axes(axes, _sizes(lines, axis), lambda value: f"{value:g}x")
        axes.set_xlabel(_AXES[axis])
        axes.set_title("sae-kernels: how many times as fast as dense, log scale")
        end_labels(axes)

    alt = f"Time of dense by ours against {axis}, for {', '.join(list(lines)[1:])}."
    caption = f"{_fixed(lines, axis)}. Bands: p20 to p80 of dense, by our median."
    return Drawing("crossover", alt, caption, draw)


def memory(lines: Lines) -> Drawing:
    """Peak memory against F."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for records in lines.values():
            line(axes, records, "F", lambda r, ms: r["peak_bytes"] / 2**20)
        log_axes(axes, _sizes(lines, "F"), lambda value: size(value * 2**20), base=2)
        axes.set_xlabel(_AXES["F"])
        axes.set_title(f"Peak memory, log scale: {_kind(lines)}")
        end_labels(axes)

    alt = f"Peak memory against F, for {', '.join(lines)}."
    return Drawing("memory-F", alt, f"{_fixed(lines, 'F')}.", draw)


def roofline(points: list[Record], copy: float, products: dict[str, float]) -> Drawing:
    """Achieved FLOP/s of every record, under its machine's roofs in bytes/s and FLOP/s."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        seen: dict[str, list[Record]] = {}
        for record in points:
            seen.setdefault(label(record), []).append(record)
        for name, records in seen.items():
            line(axes, records, "", lambda r, ms: r["gflops"], joined=False, name=name)
        log_axes(axes, [], lambda value: f"{value:,g}")
        ceilings(axes, copy / 1e9, {name: rate / 1e9 for name, rate in products.items()})
        axes.set_xlabel("arithmetic intensity, FLOP per byte, log scale")
        axes.set_title("Achieved GFLOP/s, log scale")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)

    alt = f"Achieved GFLOP/s of {len(points)} measurements against arithmetic intensity."
    caption = (
        "Useful work of a case by its median time. Lines: copying memory and one matrix product, "
        "measured in the same run."
    )
    return Drawing("roofline", alt, caption, draw)


def _kind(lines: Lines) -> str:
    return what(next(iter(lines.values()))[0]).lower()


def _fixed(lines: Lines, axis: str) -> str:
    first = next(iter(lines.values()))[0]
    names = [first.get("architecture"), first.get("popularity")]
    sizes = [f"{name} = {first[name]:,}" for name in "BDFK" if name != axis and first.get(name)]
    return ", ".join([*(str(name) for name in names if name), *sizes])


def _sizes(lines: Lines, axis: str) -> list[float]:
    return sorted({float(r[axis]) for records in lines.values() for r in records})
