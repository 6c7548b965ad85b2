"""The page a training run leaves behind: figures, headline numbers and latents in context."""

from .data import Context, CurvePoint, LatentExamples, RunReport
from .figures import RenderedFigure, draw_figures
from .page import render_page, write_report

__all__ = [
    "Context",
    "CurvePoint",
    "LatentExamples",
    "RenderedFigure",
    "RunReport",
    "draw_figures",
    "render_page",
    "write_report",
]
