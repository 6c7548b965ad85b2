"""A run as pictures and one page that needs no other file and no network."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.bench.output import cells
from sae_kernels.bench.output.plots import draw
from sae_kernels.bench.output.table import machine
from sae_kernels.io.files import write_bytes
from sae_kernels.report.style import CSS, PAGE

if TYPE_CHECKING:
    from sae_kernels.bench.output.plots import Picture
    from sae_kernels.bench.results import Record, Results

_CSS = """
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .3rem; }
.wide { overflow-x: auto; margin: 0 0 .5rem; }
.wide table { width: auto; min-width: 60%; margin-top: .4rem; }
.wide th { padding-right: 1.25rem; white-space: nowrap; color: inherit; }
.wide td { padding-left: 1.25rem; white-space: nowrap; }
.wide thead th, .wide thead td { color: var(--muted); border-top: 0; vertical-align: bottom; }
.wide .quoted { font-weight: 650; }
h3 { margin-top: 1.75rem; overflow-wrap: anywhere; }
"""


def write(results: Results, folder: str | Path) -> Path:
    """Writes ``index.html`` and the pictures as PNG files into a folder, made if missing.

    Args:
        results: what to show.
        folder: where to write; files of the same names are replaced.

    Returns:
        Path of ``index.html``.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be made or written.
    """
    pictures = draw(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_bytes(folder / f"{picture.name}.png", picture.png)
    page = folder / "index.html"
    write_bytes(page, render(results, pictures).encode("utf-8", "replace"))
    return page


def render(results: Results, pictures: list[Picture]) -> str:
    """The page as HTML text."""
    notes = "".join(f'<p class="muted">{escape(note)}</p>' for note in results.notes)
    figures = "\n".join(map(_figure, pictures))
    cases = "\n".join(_case(case, records) for case, records in results.cases().items())
    body = [
        notes,
        f'<section><h2>In pictures</h2>\n<div class="figures">\n{figures}\n</div></section>'
        if pictures
        else "",
        f'<section><h2>Every case</h2>\n<p class="muted">{escape(cells.LEGEND)}</p>\n'
        f"{cases or '<p>Nothing was measured.</p>'}\n</section>",
        _facts("Libraries, and what each does differently", cells.libraries(results.provenance)),
        _provenance(results.provenance),
    ]
    return PAGE.substitute(
        title="sae-kernels benchmark",
        subtitle=escape(machine(results.provenance)),
        css=CSS + _CSS,
        body="\n".join(filter(None, body)),
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _case(case: str, records: list[Record]) -> str:
    columns = [*cells.times(records), *cells.work(records)]
    parts = [f"<h3>{escape(case)}</h3>"]
    if columns:
        parts.append(_table([*cells.who(records), *columns]))
    if split := cells.phases(records):
        parts += ['<p class="muted">Phases, milliseconds</p>', _table(split)]
    parts += [f'<p class="muted">{escape(line)}</p>' for line in cells.remarks(records)]
    return "\n".join(parts)


def _table(columns: list[cells.Column]) -> str:
    head = "".join(_cell(column, column.heading) for column in columns)
    rows = []
    for row in zip(*(column.cells for column in columns), strict=True):
        quoted = ' class="quoted"' if row[0].startswith("* ") else ""
        line = "".join(map(_cell, columns, row))
        rows.append(f"<tr{quoted}>{line}</tr>")
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _cell(column: cells.Column, text: str) -> str:
    tag = "th" if column.words else "td"
    return f"<{tag}>{escape(text)}</{tag}>"


def _provenance(provenance: Record) -> str:
    facts = [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in provenance.items()
        if name not in ("libraries", "command")
    ]
    command = provenance.get("command")
    again = f"<pre><code>{escape(str(command))}</code></pre>" if command else ""
    return _facts("How it was measured", facts) + again


def _facts(title: str, facts: list[tuple[str, str]]) -> str:
    if not facts:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in facts
    )
    return f"<section><h2>{title}</h2>\n<table>\n{rows}\n</table></section>"
