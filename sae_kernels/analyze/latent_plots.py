"""Pictures of clusters of latents and of the latents of a crosscoder of two models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.analyze.diffing import NU_ERROR, NU_RECONSTRUCTION, ONLY, SHARED
from sae_kernels.plotting.axes import count_axis, empty
from sae_kernels.plotting.style import BLUE, INK, MUTED, ORANGE, RULE
from sae_kernels.plotting.units import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sae_kernels.analyze.analysis import Analysis
    from sae_kernels.analyze.diffing import Difference
    from sae_kernels.analyze.multidimensional import Cluster

_COLUMNS, _POINTS = 4, 2000  # clusters shown of an SAE, and points of each
_NU = 1.5  # the axes of latent scaling end there; what lies beyond is drawn at the end


def clusters_row(figure: Figure, analyses: Sequence[Analysis]) -> None:
    """A row for each SAE: the points of its best clusters in their first two components."""
    figure.set_size_inches(8, 0.2 + 2.4 * len(analyses))
    rows = figure.subplots(len(analyses), _COLUMNS, squeeze=False)
    for row, analysis in zip(rows, analyses, strict=True):
        row[0].set_title(analysis.name[-40:], parse_math=False)
        for axes in row:
            axes.set_axis_off()
        for axes, cluster in zip(row, analysis.clusters or (), strict=False):
            cluster_panel(axes, cluster)


def cluster_panel(axes: Axes, cluster: Cluster) -> None:
    """The points of a cluster in its first two principal components, on equal scales."""
    axes.set_axis_on()
    points = cluster.points[:: -(-len(cluster.points) // _POINTS)].cpu()
    x, y = points.T.tolist()
    axes.scatter(x, y, s=2, color=BLUE, alpha=0.4, linewidth=0, rasterized=True)
    axes.set_aspect("equal", adjustable="datalim")
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(RULE)
    kept = " ".join(map(str, cluster.latents[:4].tolist()))
    more = "" if len(cluster.latents) <= 4 else f" and {len(cluster.latents) - 4} more"
    indices = f"separable {number(cluster.separability, 2)}, mixed {number(cluster.mixture, 2)}"
    axes.set_xlabel(f"{kept}{more}\n{indices}", fontsize=7.5)


def difference_row(figure: Figure, analyses: Sequence[Analysis]) -> None:
    """A row for each crosscoder: relative decoder norms, and latent scaling."""
    figure.set_size_inches(8, 0.3 + 2.9 * len(analyses))
    rows = figure.subplots(len(analyses), 2, squeeze=False)
    for (left, right), analysis in zip(rows, analyses, strict=True):
        assert analysis.difference is not None
        norms_panel(left, analysis.difference)
        left.set_title(analysis.name[-40:], parse_math=False)
        scaling_panel(right, analysis.difference)


def norms_panel(axes: Axes, found: Difference) -> None:
    """A histogram of the relative decoder norms."""
    norms = found.relative_norm.cpu()
    counts = torch.histc(norms[norms.isfinite()].double(), 50, 0, 1).tolist()
    edges = torch.linspace(0, 1, 51).tolist()
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.6)
    for limit in (ONLY, 0.5 - SHARED, 0.5 + SHARED, 1 - ONLY):
        # Up to the names above, which stand at 1 / 1.3 of the height.
        axes.axvline(limit, 0, 0.75, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    top = 1.15 * max(*counts, 1)
    named = ((0.0, "left", found.base_only), (0.5, "center", found.shared))
    for x, side, mask in (*named, (1.0, "right", found.chat_only)):
        name = {0.0: "base only", 0.5: "shared", 1.0: "chat only"}[x]
        axes.text(x, top, f"{name}\n{int(mask.sum()):,}", ha=side, va="bottom", fontsize=8)
    axes.set_ylim(0, top)
    count_axis(axes, norms, "relative decoder norm")
    axes.set_ylim(0, 1.3 * top)
    axes.set_xlim(0, 1)


def scaling_panel(axes: Axes, found: Difference) -> None:
    """Latent scaling of each latent of one model: its two nus."""
    if found.nu_error is None or found.nu_reconstruction is None:
        empty(axes)
        return
    for mask, colour, name in (
        (found.base_only, ORANGE, "base only"),
        (found.chat_only, BLUE, "chat only"),
    ):
        nus = torch.stack([found.nu_error[mask], found.nu_reconstruction[mask]]).cpu()
        x, y = nus[:, nus.isfinite().all(0)].clamp(-0.25, _NU).tolist()
        if x:
            axes.scatter(x, y, s=9, color=colour, alpha=0.6, linewidth=0, label=name)
    axes.plot([NU_ERROR] * 2 + [-0.25], [-0.25] + [NU_RECONSTRUCTION] * 2, color=INK, linewidth=0.9)
    axes.text(NU_ERROR + 0.04, -0.2, "in the corner: truly one's own", fontsize=8, va="bottom")
    axes.set_xlim(-0.25, _NU)
    axes.set_ylim(-0.25, _NU)
    axes.set_xlabel("nu_error: in the other model's error")
    axes.set_ylabel("nu_reconstruction")
    if axes.collections:
        axes.legend(loc="upper right", fontsize=8, frameon=False)
