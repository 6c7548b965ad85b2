"""The latent browser: all latents of an SAE in one HTML file, with search and contexts."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from importlib import resources
from typing import TYPE_CHECKING, Any

from sae_kernels.plotting import page

from .latent_table import RADIUS, LatentTable

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor


def write_browser(table: LatentTable, path: str | Path, *, title: str, subtitle: str) -> Path:
    """Writes the page; it needs no other file and no network, and appears whole or not at all.

    Everything about the latents is one compressed stream in the page, which the browser
    decompresses: about 120 bytes a latent.

    Args:
        table: what to show.
        path: the HTML file; its folder is made if missing.
        title, subtitle: of the page.

    Raises:
        OSError: the folder cannot be made or written.
    """
    script = resources.files(__package__).joinpath("browser.js").read_text()
    html = page.render(
        "report/browser.html",
        title=title,
        subtitle=subtitle,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=base64.b64encode(pack(table)).decode(),
    )
    return page.write(path, html, [])


def pack(table: LatentTable) -> bytes:
    """The table as one zlib stream: a line of JSON that names the arrays, then their bytes.

    Activations, shares and changes of logits are rounded to a 255th of the largest, of the
    latent's own for activations, and a bar of the histogram to a 255th of the logarithm.
    """
    scale = table.high.where(table.high > 0, 1)[:, None, None]
    bars = table.histogram.float().log1p()
    arrays = {
        "stream": _smallest(table.stream),
        "documents": _smallest(table.documents),
        "counts": _smallest(table.counts),
        "low": table.low.float().numpy(),
        "high": table.high.float().numpy(),
        "histogram": _bytes(bars / bars.amax(1, keepdim=True).clamp(min=1)),
        "peaks": _smallest(table.peaks + 1),
        # Any activation stays visible.
        "activations": _bytes((table.activations / scale).clamp(0, 1), least=table.activations > 0),
        "neighbours": _smallest(table.neighbours + 1),
        "together": _bytes(table.together),
    }
    scales = {}
    for name in ("promoted", "suppressed"):
        tokens, by = getattr(table, name), getattr(table, f"{name}_by")
        if tokens is not None:
            scales[name] = float(by.abs().max().clamp(min=1e-30))
            arrays |= {name: _smallest(tokens), f"{name}_by": _bytes(by.abs() / scales[name])}
    header = {
        "words": table.words,
        "scales": scales,
        "radius": RADIUS,
        "arrays": [
            {"name": name, "dtype": array.dtype.str[1:], "shape": array.shape}
            for name, array in arrays.items()
        ],
    }
    text = json.dumps(header, ensure_ascii=True).encode()
    return zlib.compress(b"\n".join([text, b"".join(a.tobytes() for a in arrays.values())]), 9)


def _smallest(values: Tensor) -> np.ndarray[Any, Any]:
    """Unsigned integers in the smallest dtype that holds them, little-endian."""
    dtype = "<u2" if not values.numel() or int(values.max()) < 1 << 16 else "<u4"
    return values.numpy().astype(dtype)


def _bytes(shares: Tensor, least: Tensor | None = None) -> np.ndarray[Any, Any]:
    """Shares of 0 to 1 as bytes; those of ``least`` are 1 at least."""
    rounded = (shares * 255).round()
    return (rounded if least is None else rounded.maximum(least.float())).numpy().astype("|u1")
