"""The figures of a report: training curves and histograms of its latents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sae_kernels.plotting.axes import count_axis, line, log_ticks, percent_axis, step_axis
from sae_kernels.plotting.figure import Drawing
from sae_kernels.plotting.style import BLUE, INK, ORANGE
from sae_kernels.plotting.units import number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from .data import RunReport


def drawings(report: RunReport) -> list[Drawing]:
    """The drawings for which a report has data, in the order of the page."""
    cosine = report.decoder_cosine.detach().double().cpu()
    density = report.latent_density
    density = None if density is None else density.detach().double().cpu()
    curves = [_reconstruction_drawing(report), _sparsity_drawing(report)] if report.curve else []
    densities = [] if density is None else [_density_drawing(report, density)]
    return [*curves, *densities, _cosine_drawing(report, density, cosine)]


def _reconstruction_drawing(report: RunReport) -> Drawing:
    fvu, last = report.measured_fvu, report.curve[-1]
    new = report.measured_on == "held-out"
    dashed = (
        "data the training never saw" if new else f"the trained SAE on {report.measured_on} data"
    )
    return Drawing(
        "reconstruction",
        lambda figure: _reconstruction(figure, report),
        f"Loss and FVU against training step. Final FVU {number(last.fvu)}"
        + ("." if fvu is None else f", {report.measured_on} FVU {number(fvu)}."),
        "FVU is the fraction of variance unexplained: 0 is a perfect reconstruction, "
        "1 no better than the mean."
        + (f" The dashed line is {dashed}." if 0 < (fvu or 0) < math.inf else ""),
    )


def _sparsity_drawing(report: RunReport) -> Drawing:
    last = report.curve[-1]
    return Drawing(
        "sparsity",
        lambda figure: _sparsity(figure, report),
        f"L0 and dead latents against training step. Final L0 {number(last.l0)}, "
        f"dead {percent(last.dead_fraction)}.",
        "L0 is how many latents fire on a token. Dead latents are capacity paid for and not used.",
    )


def _density_drawing(report: RunReport, density: Tensor) -> Drawing:
    return Drawing(
        "density",
        lambda figure: _density(figure, density, report.measured_on),
        f"Histogram of how often each latent fires on {report.measured_on} tokens; "
        f"{_never(report)}.",
        "A latent far to the left is rare and specific; one near 100\u202f% fires on almost "
        "everything and is seldom interpretable.",
    )


def _cosine_drawing(report: RunReport, density: Tensor | None, cosine: Tensor) -> Drawing:
    median = cosine[cosine.isfinite()].median().item() if cosine.isfinite().any() else None
    never = "" if density is None else f"; {_never(report)}"
    return Drawing(
        "decoder_cosine",
        lambda figure: _cosine(figure, density, cosine),
        f"Histogram of each latent's largest decoder cosine to another latent, median "
        f"{number(median)}{never}.",
        "Latents near 1 are near-copies of another latent: the dictionary spends two entries on "
        "one direction.",
    )


def _never(report: RunReport) -> str:
    return f"{report.never_fired:,} of {report.n_latents:,} latents never fired"


def _reconstruction(figure: Figure, report: RunReport) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    steps = [p.step for p in report.curve]
    line(top, steps, [p.loss for p in report.curve], number)
    top.set_title("Loss")
    # A log axis has no place for 0 or below; those points are left out like missing ones.
    fvu = [p.fvu if p.fvu > 0 else math.nan for p in report.curve]
    bottom.set_yscale("log")
    line(bottom, steps, fvu, number)
    bottom.set_title("FVU, log scale")
    measured = report.measured_fvu
    if measured is not None and 0 < measured < math.inf:
        bottom.axhline(measured, color=ORANGE, linewidth=1.2, linestyle=(0, (4, 3)))
        # In the title line, where no curve can run through it.
        bottom.set_title(
            f"{report.measured_on} {number(measured)}", loc="right", color=ORANGE,
            fontsize="medium", fontweight="normal",
        )  # fmt: skip
    log_ticks(bottom.yaxis)
    step_axis(bottom, steps)


def _sparsity(figure: Figure, report: RunReport) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [p.step for p in report.curve]
    line(top, steps, [p.l0 for p in report.curve], number)
    top.set_title("L0, latents per token")
    line(bottom, steps, [p.dead_fraction for p in report.curve], percent)
    bottom.set_title("Dead latents, share of dictionary")
    percent_axis(bottom)
    for axes in (top, bottom):
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-3))
    step_axis(bottom, steps)


def _density(figure: Figure, density: Tensor, measured_on: str) -> None:
    axes = figure.subplots()
    never = int((density == 0).sum())
    fired = density[(density > 0) & density.isfinite()]
    logs = fired.clamp(max=1).log10()
    low = min(-2, math.floor(logs.min())) if len(logs) else -4
    dead_at = 1.2 * low
    axes.hist(logs.numpy(), bins=torch.linspace(low, 0, -low * 5 + 1).tolist(), color=BLUE)
    axes.bar([dead_at], [never], width=-0.05 * low, color=ORANGE)
    count_axis(axes, density, f"share of {measured_on} tokens, log scale")
    # Above the bars, not on its own bar, where it would cover those of rare latents.
    axes.text(
        0.02, 0.99, f"{never:,} of {len(density):,} never fired", color=ORANGE, va="top",
        transform=axes.transAxes,
    )  # fmt: skip
    if len(logs):
        median = float(logs.median())
        axes.axvline(median, ymax=0.84, color=INK, linewidth=0.9)
        axes.text(median, 0.855, f"median {percent(10**median)}", ha="center",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    decades = range(0, low - 1, -1 if low >= -5 else -2)
    labels = [f"{10.0 ** (d + 2):.{max(0, -d - 2)}f}\u202f%" for d in decades]
    axes.set_xticks([dead_at, *decades], ["never", *labels])
    axes.set_xlim(1.27 * low, -0.03 * low)
    axes.set_title("How often latents fire")


def _cosine(figure: Figure, density: Tensor | None, cosine: Tensor) -> None:
    axes = figure.subplots()
    known = cosine.isfinite()
    dead = torch.zeros_like(known) if density is None else density == 0
    lowest = float(cosine[known].min()) if known.any() else 0.0
    edges = torch.linspace(min(0.0, math.floor(10 * lowest) / 10), 1.0, 51).tolist()
    groups = [cosine[known & ~dead].clamp(max=1).numpy(), cosine[known & dead].clamp(max=1).numpy()]
    axes.hist(groups, bins=edges, stacked=True, color=[BLUE, ORANGE])
    count_axis(axes, cosine, "largest cosine to another decoder row")
    counts = [(f"{int((~dead).sum()):,} fired", BLUE), (f"{int(dead.sum()):,} never fired", ORANGE)]
    for row, (text, colour) in enumerate([] if density is None else counts):
        axes.text(0.99, 0.97 - 0.075 * row, text, color=colour, transform=axes.transAxes,
                  ha="right", va="top")  # fmt: skip
    axes.set_xlim(edges[0], 1)
    axes.set_title("Nearest neighbour in the dictionary")
