"""Groups of SAEs to compare: those of equal width, and those of equal FLOPs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_kernels.analyze.analysis import Analysis
    from sae_kernels.nn import SAEConfig


class Frontier(NamedTuple):
    """SAEs of several architectures with equal width or equal FLOPs, to compare (arXiv 2410.08201).

    Attributes:
        name: what they have in common.
        kinds: the SAEs of each kind, by L0; those without experts first, then by their number.
    """

    name: str
    kinds: dict[str, list[Analysis]]


def frontiers(analyses: Sequence[Analysis]) -> list[Frontier]:
    """Groups the evaluated SAEs by width and by the latents that a token is encoded with.

    Encoding takes 2 D FLOPs per latent (a router's E rows are not counted). Groups of a single
    kind are left out.
    """
    measured = [each for each in analyses if each.evaluation is not None]
    found = _groups(measured, "equal width", "in all", lambda config: config.n_latents)
    same = [list(each.kinds.values()) for each in found]
    by_flops = _groups(measured, "equal FLOPs", "met by a token", lambda config: config.n_encoded)
    return found + [each for each in by_flops if list(each.kinds.values()) not in same]


def _groups(
    analyses: Sequence[Analysis], what: str, where: str, size: Callable[[SAEConfig], int]
) -> list[Frontier]:
    groups: dict[int, dict[str, list[Analysis]]] = {}
    for each in sorted(analyses, key=lambda each: (each.n_experts, each.shared, _l0(each))):
        groups.setdefault(size(each.config), {}).setdefault(_kind(each), []).append(each)
    return [
        Frontier(f"{what}: {n:,} latents {where}", kinds)
        for n, kinds in sorted(groups.items())
        if len(kinds) > 1
    ]


def _kind(analysis: Analysis) -> str:
    name = analysis.config.architecture
    if analysis.n_experts == 1:
        return name
    return f"{name}, {analysis.n_experts} experts" + ", one shared" * analysis.shared


def _l0(analysis: Analysis) -> float:
    assert analysis.evaluation is not None
    return analysis.evaluation.l0
