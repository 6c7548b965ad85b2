"""Writing the page of a training run: one HTML file and its figures as PNG files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.plotting import figure, page
from sae_kernels.plotting.units import duration, number, parse, percent, rate

from .browser import write_browser
from .contexts import card
from .plots import drawings

if TYPE_CHECKING:
    from sae_kernels.plotting.figure import Picture

    from .data import RunReport

BROWSER = "latents.html"
_METRICS = {
    "fvu": ("FVU", "fraction of variance unexplained, 0 is perfect"),
    "explained_variance": ("Explained variance", "1 minus FVU"),
    "l0": ("L0", "mean number of latents that fire on a token"),
    "cosine": ("Cosine", "mean cosine of input and reconstruction"),
    "mse": ("MSE", "mean squared error per token"),
    "dead_fraction": ("Dead latents", ""),
    "dense_fraction": ("Dense latents", "share that fires on a large part of all tokens"),
    "seconds": ("Training time", ""),
    "tokens_per_second": ("Training speed", ""),
}
_FORMATS = {"seconds": duration, "tokens_per_second": rate, "explained_variance": percent}


def write_report(report: RunReport, folder: str | Path) -> Path:
    """Writes ``report.html`` and the figures' PNG files into ``folder``, made if missing.

    A report with a table of all latents gets a second page, ``latents.html``, to search them. The
    pages need no other file and no network. Each file appears whole or not at all, so a page
    that is already there stays readable until the new one replaces it.

    Args:
        report: what to show.
        folder: where to write.

    Returns:
        Path of ``report.html``.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be made or written.
    """
    figures = draw_figures(report)
    if report.latents is not None:
        path = Path(folder) / BROWSER
        subtitle = f"{report.n_latents:,} latents. {report.title}: {report.subtitle}"
        write_browser(report.latents, path, title="Latents", subtitle=subtitle)
    return page.write(Path(folder) / "report.html", render_page(report, figures), figures)


def draw_figures(report: RunReport) -> list[Picture]:
    """Draws every figure of a report, as PNG and as SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Small on purpose: the same drawing must be readable half a desktop wide and on a phone.
    size = (4.9, 3.6)
    return figure.render(drawings(report), "the report's figures", size=size, dpi=220, svg=True)


def render_page(report: RunReport, figures: list[Picture]) -> str:
    """The page as HTML text."""
    measured = report.measured_fvu is not None
    return page.render(
        "report/page.html",
        title=report.title,
        subtitle=report.subtitle,
        tiles=_tiles(report),
        figures=figures,
        browser=None if report.latents is None else BROWSER,
        n_latents=report.n_latents,
        cards=None if report.examples is None else [card(e) for e in report.examples],
        results_title=f"{report.measured_on.capitalize()} results" if measured else "Results",
        metrics=[_metric(report, *item) for item in report.metrics.items()],
        facts=[(name, value, "") for name, value in report.facts.items()],
        command=report.command,
    )


def _tiles(report: RunReport) -> list[tuple[str, str, str]]:
    """The headline numbers, each a name, a value and a note."""
    metrics, measured = report.metrics, report.measured_fvu
    fvu, l0 = metrics.get("fvu") if measured is None else measured, metrics.get("l0")
    name = "FVU" if measured is None else f"{report.measured_on.capitalize()} FVU"
    if fvu is None and report.curve:  # nobody measured it: what training said last
        name, fvu, l0 = "Last batch's FVU", report.curve[-1].fvu, report.curve[-1].l0
    explained = percent(1 - fvu) if fvu is not None and math.isfinite(fvu) else ""
    total = report.n_latents
    never = math.nan if report.never_fired is None or not total else report.never_fired / total
    dead = metrics.get("dead_fraction", never)
    count = f"{round(dead * total):,} of {total:,} " if math.isfinite(dead) else ""
    seconds = metrics.get("seconds", parse(report.facts.get("seconds")))
    tokens = parse(report.facts.get("tokens"))
    speed = metrics.get("tokens_per_second", tokens / seconds if tokens and seconds else None)
    return [
        (name, number(fvu), f"{explained} of variance explained" if explained else ""),
        ("L0", number(l0), f"of {total:,} latents fire on a token"),
        ("Dead latents", percent(dead), count + report.dead_rule),
        ("Training time", duration(seconds), rate(speed)),
    ]


def _metric(report: RunReport, key: str, value: float) -> tuple[str, str, str]:
    """Name, value and explanation of a result."""
    name, meaning = _METRICS.get(key, (key.replace("_", " "), ""))
    show = _FORMATS.get(key, percent if key.endswith("_fraction") else number)
    return (
        name,
        show(value),
        f"share that {report.dead_rule}" if key == "dead_fraction" else meaning,
    )
