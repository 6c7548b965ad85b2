"""HTML pages from jinja2 templates: one frame and style sheet, every value escaped."""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from sae_kernels.io.files import write_bytes
from sae_kernels.plotting import tables, units

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sae_kernels.plotting.figure import Picture


@functools.cache
def _environment() -> jinja2.Environment:
    """The jinja2 environment; a template is named by its path in the package: report/page.html."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sae_kernels", ""),
        autoescape=True,  # pages show strings of strangers: tokens, paths, error messages
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=units.number,
        percent=units.percent,
        rows=tables.rows,
        base64=lambda content: base64.b64encode(content).decode(),
    )
    return environment


def render(template: str, **values: Any) -> str:
    """Renders a template to HTML text.

    Args:
        template: path of the template below the package.
        values: what it shows; every string is escaped.
    """
    return _environment().get_template(template).render(values)


def write(page: str | Path, html: str, pictures: Iterable[Picture]) -> Path:
    """Writes a page and, beside it, the PNG files of its pictures; the folder is made if missing.

    Each file appears whole or not at all, so that a page that is already there stays readable until
    the new one replaces it.

    Raises:
        OSError: the folder cannot be made or written.
    """
    page = Path(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_bytes(page.with_name(f"{picture.name}.png"), picture.png)
    # A lone surrogate in a token, which a tokenizer can produce, must not lose the page.
    write_bytes(page, html.encode("utf-8", "replace"))
    return page
