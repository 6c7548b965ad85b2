"""The page a training run leaves behind: one HTML file and its figures as PNG files."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.io.files import write_bytes

from .contexts import latents_section
from .figures import RenderedFigure, draw_figures
from .style import CSS, PAGE
from .units import duration, number, parse, percent, rate

if TYPE_CHECKING:
    from .data import RunReport

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

_NUMBERS = ("no", "one", "two", "three", "four")

_EXAMPLES_LEAD = (
    "Text around the tokens on which each latent fires most strongly, the strongest "
    "underlined; the deeper the colour, the stronger. Hover for values, click or tap a line to "
    "unfold it."
)


def write_report(report: RunReport, folder: Path) -> Path:
    """Write ``report.html`` and the figures' PNG files into ``folder``, made if missing.

    The page needs no other file and no network. Each file appears whole or not at all, so a
    page that is already there stays readable until the new one replaces it.

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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        write_bytes(folder / f"{figure.name}.png", figure.png)
    page = folder / "report.html"
    # A lone surrogate in a token, which a tokenizer can produce, must not lose the page.
    write_bytes(page, render_page(report, figures).encode("utf-8", "replace"))
    return page


def render_page(report: RunReport, figures: list[RenderedFigure]) -> str:
    """Return the page as HTML text."""
    sections = [
        _tiles(report),
        _section(_pictures(len(figures)), "", _figures(figures)),
    ]
    if report.examples is not None:
        lead = _EXAMPLES_LEAD if report.examples else ""
        body = latents_section(report.examples)
        sections.append(_section("What the latents respond to", lead, body))
    sections.append(_tables(report))
    if report.command:
        code = f"<pre><code>{escape(report.command)}</code></pre>"
        sections.append(_section("Reproduce", "", code))
    return PAGE.substitute(
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        css=CSS,
        body="\n".join(sections),
    )


def _section(title: str, lead: str, body: str) -> str:
    lead = f'<p class="muted">{lead}</p>\n' if lead else ""
    return f"<section>\n<h2>{title}</h2>\n{lead}{body}\n</section>"


def _pictures(n: int) -> str:
    return f"The run in {_NUMBERS[n]} picture{'s' if n > 1 else ''}"


def _tiles(report: RunReport) -> str:
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
    tiles = [
        (name, number(fvu), f"{explained} of variance explained" if explained else ""),
        ("L0", number(l0), f"of {total:,} latents fire on a token"),
        ("Dead latents", percent(dead), count + report.dead_rule),
        ("Training time", duration(seconds), rate(speed)),
    ]
    cells = "\n".join(
        f'<div><dt>{name}</dt><dd class="big">{value}</dd><dd class="note">{note}</dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles" aria-label="Headline results">\n{cells}\n</dl>'


def _figures(figures: list[RenderedFigure]) -> str:
    return '<div class="figures">\n{}\n</div>'.format(
        "\n".join(
            f'<figure><div role="img" aria-label="{escape(f.alt)}">{f.svg}</div>'
            f"<figcaption>{escape(f.caption)}</figcaption></figure>"
            for f in figures
        )
    )


def _tables(report: RunReport) -> str:
    metrics = []
    for key, value in report.metrics.items():
        name, meaning = _METRICS.get(key, (key.replace("_", " "), ""))
        meaning = f"share that {report.dead_rule}" if key == "dead_fraction" else meaning
        show = _FORMATS.get(key, percent if key.endswith("_fraction") else number)
        small = f"<small>{escape(meaning)}</small>" if meaning else ""
        metrics.append((escape(name) + small, escape(show(value))))
    facts = [(escape(key), escape(value)) for key, value in report.facts.items()]
    return (
        f'<div class="tables">\n{_section(_results(report), "", _table(metrics))}\n'
        f"{_section('How it was made', '', _table(facts))}\n</div>"
    )


def _results(report: RunReport) -> str:
    if report.measured_fvu is None:
        return "Results"
    return f"{report.measured_on.capitalize()} results"


def _table(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return '<p class="muted">Nothing recorded.</p>'
    cells = "\n".join(f'<tr><th scope="row">{k}</th><td>{v}</td></tr>' for k, v in rows)
    return f"<table>\n{cells}\n</table>"
