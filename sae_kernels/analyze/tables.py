"""Tables of an analysis for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.analyze.geometry import median, n_duplicates
from sae_kernels.plotting.units import number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.analyze.analysis import Analysis

_NONE = "-"


def comparison(analyses: Sequence[Analysis]) -> list[tuple[str, ...]]:
    """A table of measures by SAE; measures that no SAE has are left out."""
    columns = [_column(analysis) for analysis in analyses]
    names = dict.fromkeys(name for column in columns for name in column)
    ordered = sorted(names, key=list(_ORDER).index)
    return [(name, *(column.get(name, _NONE) for column in columns)) for name in ordered]


_ORDER = (
    "",
    "latents",
    "latents a token meets",
    "rows compared",
    "rows of zeros",
    "nearest neighbour, median cosine",
    "  in the same expert",
    "  in other experts",
    "latents with a duplicate",
    "  a duplicate in the same expert",
    "  a duplicate in another expert",
    "groups of duplicates",
    "distinct latents",
    "FVU",
    "L0",
    "dead latents",
    "effective experts",
    "load balance, 1 is even",
    "variance between experts",
    "clusters of latents",
    "  the best: latents, score",
    "latents of both models",
    "  of the first alone",
    "  of the second alone",
    "  confirmed by latent scaling",
)


def _column(analysis: Analysis) -> dict[str, str]:
    shape, config = analysis.geometry, analysis.config
    n = config.n_latents
    found = {
        "": analysis.name,
        "latents": f"{n:,}",
        "latents a token meets": f"{config.n_encoded:,}",
        "rows compared": analysis.side,
        "rows of zeros": f"{int(shape.zero.sum()):,}",
        "nearest neighbour, median cosine": number(median(shape.nearest)),
        "latents with a duplicate": _duplicates(shape.nearest, shape.threshold),
        "groups of duplicates": _groups(analysis),
        "distinct latents": _part(shape.n_distinct, n),
    }
    if analysis.n_experts > 1:
        found["latents"] += f" in {analysis.n_experts} experts"
        found |= {
            "  in the same expert": number(median(shape.within)),
            "  in other experts": number(median(shape.across)),
            "  a duplicate in the same expert": _duplicates(shape.within, shape.threshold),
            "  a duplicate in another expert": _duplicates(shape.across, shape.threshold),
        }
    if analysis.evaluation is not None:
        measured = analysis.evaluation
        dead = int((measured.latent_density == 0).sum())
        found |= {
            "FVU": f"{measured.fvu:.5f}",
            "L0": f"{measured.l0:.2f}",
            "dead latents": _part(dead, n),
        }
    if analysis.use is not None:
        use = analysis.use
        found |= {
            "effective experts": f"{use.effective_experts:.2f} of {len(use.load)}",
            "load balance, 1 is even": f"{use.balance:.3f}",
            "variance between experts": _percent(use.between),
        }
    if analysis.clusters is not None:
        found["clusters of latents"] = f"{len(analysis.clusters):,}"
        for best in analysis.clusters[:1]:
            found["  the best: latents, score"] = f"{len(best.latents)}, {number(best.score)}"
    if analysis.difference is not None:
        whose = analysis.difference
        found |= {
            "latents of both models": _part(int(whose.shared.sum()), n),
            "  of the first alone": _part(int(whose.base_only.sum()), n),
            "  of the second alone": _part(int(whose.chat_only.sum()), n),
        }
        if whose.truly_own is not None:
            found["  confirmed by latent scaling"] = f"{int(whose.truly_own.sum()):,}"
    return found


def by_expert(analysis: Analysis) -> list[tuple[str, ...]]:
    """A table of the experts of a Switch SAE, given data."""
    use, dead = analysis.use, analysis.dead()
    if use is None or dead is None:
        return []
    heads = ("expert", "tokens", "router p", "own p", "FVU", "offset", "dead latents")
    table = torch.stack([use.load, use.probability, use.chosen, use.fvu, use.offset], 1).tolist()
    rows: list[tuple[str, ...]] = []
    if analysis.shared:
        rows.append(("0, shared", *[_NONE] * 5, _percent(float(dead[0]))))
    for e, (load, p, own, fvu, offset) in enumerate(table, analysis.shared):
        shown = (_percent(load), number(p), number(own), number(fvu), number(offset))
        rows.append((str(e), *shown, _percent(float(dead[e]))))
    return [heads, *rows]


def _duplicates(cosines: torch.Tensor, threshold: float) -> str:
    return _part(n_duplicates(cosines, threshold), len(cosines))


def _groups(analysis: Analysis) -> str:
    sizes = analysis.geometry.groups.bincount()
    n = int((sizes > 1).sum())
    if not n:
        return "0"
    across = f", {analysis.geometry.n_spanning:,} across experts" if analysis.n_experts > 1 else ""
    return f"{n:,}{across}, the largest of {int(sizes.max()):,}"


def _part(n: int, total: int) -> str:
    return f"{n:,} ({_percent(n / total)})" if n else "0"


def _percent(part: float) -> str:
    # Not every terminal's encoding has the narrow space of the pictures.
    return percent(part).replace("\u202f", " ")
