"""The HTML report of a training run: figures, headline numbers and latents in context."""

from .data import CurvePoint, LatentExamples, RunReport, TokenContext
from .page import draw_figures, render_page, write_report

__all__ = [
    "CurvePoint",
    "LatentExamples",
    "RunReport",
    "TokenContext",
    "draw_figures",
    "render_page",
    "write_report",
]
