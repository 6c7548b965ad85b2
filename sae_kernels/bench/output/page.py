"""Writing the pictures and the self-contained HTML page of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.bench.output import cells
from sae_kernels.bench.output.pictures import draw
from sae_kernels.plotting import page

if TYPE_CHECKING:
    from sae_kernels.bench.results import Results


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
    pictures, facts = draw(results), dict(results.provenance)
    libraries, command = cells.libraries(facts), facts.pop("command", None)
    facts.pop("libraries", None)
    html = page.render(
        "bench/output/page.html",
        title="sae-kernels benchmark",
        subtitle=cells.machine(results.provenance),
        notes=results.notes,
        pictures=pictures,
        legend=cells.LEGEND,
        cases=cells.cases(results),
        libraries=libraries,
        facts=[(n, v if isinstance(v, str) else json.dumps(v)) for n, v in facts.items()],
        command=command,
    )
    return page.write(Path(folder) / "index.html", html, pictures)
