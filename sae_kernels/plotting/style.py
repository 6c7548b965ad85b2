"""Colours and matplotlib settings of all pictures."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

INK, MUTED, RULE, BLUE, ORANGE = "#1f2328", "#59606a", "#d9dde2", "#0072b2", "#bf5000"
"""Figure colours; blue against orange stays apart for every common colour blindness."""

GREEN, PURPLE = "#00785a", "#a3457a"
"""Further line colours, which differ in lightness too and are dark enough for text on white."""

CSS_NAMES = {INK: "ink", "#000000": "ink", MUTED: "muted", RULE: "rule", BLUE: "blue",
              ORANGE: "orange"}  # fmt: skip

STYLE: dict[Any, Any] = {
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "figure.titlesize": 10.5,
    "figure.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.5,
    # Text stays text, so the page's own font applies and a reader can search and copy it.
    "svg.fonttype": "none",
}


@contextmanager
def house_style(what: str) -> Iterator[None]:
    """Applies the common matplotlib settings in the block; ``what`` is named in the error.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f'{what} need matplotlib: pip install "sae-kernels[report]"') from error
    with matplotlib.rc_context(STYLE):
        yield
