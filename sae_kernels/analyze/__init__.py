"""Analyses of saved SAEs: nearest neighbours and duplicates of latents, and use of experts."""

from sae_kernels.analyze.analysis import Analysis, analyze
from sae_kernels.analyze.experts import ExpertUse, effective_number, expert_use
from sae_kernels.analyze.geometry import Geometry, geometry
from sae_kernels.analyze.groups import UnionFind
from sae_kernels.analyze.output import write_analyses
from sae_kernels.analyze.plots import check_drawable, draw

__all__ = [
    "Analysis",
    "ExpertUse",
    "Geometry",
    "UnionFind",
    "analyze",
    "check_drawable",
    "draw",
    "effective_number",
    "expert_use",
    "geometry",
    "write_analyses",
]
