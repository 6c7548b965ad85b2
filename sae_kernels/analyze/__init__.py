"""Analyses of saved SAEs: latents that are alike, multi-dimensional features, experts, diffing."""

from sae_kernels.analyze.analysis import Analysis, analyze
from sae_kernels.analyze.diffing import Difference, difference, latent_scaling
from sae_kernels.analyze.experts import ExpertUse, effective_number, expert_use
from sae_kernels.analyze.geometry import Geometry, geometry
from sae_kernels.analyze.groups import UnionFind
from sae_kernels.analyze.multidimensional import (
    Cluster,
    Neighbours,
    co_firing,
    codes_of,
    find_clusters,
    join_neighbours,
    measure_cluster,
    mixture,
    neighbours,
    separability,
)
from sae_kernels.analyze.output import write_analyses
from sae_kernels.analyze.plots import check_drawable, draw

__all__ = [
    "Analysis",
    "Cluster",
    "Difference",
    "ExpertUse",
    "Geometry",
    "Neighbours",
    "UnionFind",
    "analyze",
    "check_drawable",
    "co_firing",
    "codes_of",
    "difference",
    "draw",
    "effective_number",
    "expert_use",
    "find_clusters",
    "geometry",
    "join_neighbours",
    "latent_scaling",
    "measure_cluster",
    "mixture",
    "neighbours",
    "separability",
    "write_analyses",
]
