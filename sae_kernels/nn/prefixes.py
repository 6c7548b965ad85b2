"""Prefixes of the latents that reconstruct alone in Matryoshka SAEs (arXiv 2503.17547)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.nn.objective import Prefixes

if TYPE_CHECKING:
    from collections.abc import Iterable

# Group sizes of the presets: each is n_latents over this, the last takes the rest.
NESTED = (16, 16, 8, 4, 2)


def nested_groups(n_latents: int, parts: tuple[int, ...] = NESTED) -> tuple[int, ...]:
    """Group sizes ``n_latents // part`` for each part; the last group takes what is left.

    Raises:
        ValueError: fewer latents than groups.

    Example:
        >>> nested_groups(100)
        (6, 6, 12, 25, 51)
    """
    if n_latents < len(parts):
        raise ValueError(
            f"n_latents: expected at least {len(parts)} for as many groups, got {n_latents}"
        )
    sizes = [max(1, n_latents // part) for part in parts[:-1]]
    return (*sizes, n_latents - sum(sizes))


def check_groups(groups: tuple[int, ...] | None, n_latents: int) -> None:
    """Raises ValueError unless the group sizes are positive and add up to n_latents."""
    if groups is None:
        return
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in groups)
    if not (whole and sum(groups) == n_latents):
        total = f"{sum(groups)} in all" if whole and groups else "no such list"
        raise ValueError(
            f"groups: expected positive integers that add up to n_latents = {n_latents}, "
            f"got {groups!r} ({total})"
        )


def prefixes_of(
    groups: tuple[int, ...] | None,
    n_latents: int,
    objective: Any,
    step: int,
    seed: int,
    device: torch.device,
) -> Prefixes:
    """The prefixes at a 0-based step: random ones if the objective says so, else the groups."""
    if groups is None or objective.random_prefixes:
        ends = _random_ends(n_latents, objective.random_prefixes, seed, step)
        return _weighted(ends.tolist(), objective.matryoshka, device)
    return _fixed(groups, objective.matryoshka, device)


@functools.cache
def _fixed(groups: tuple[int, ...], matryoshka: str, device: torch.device) -> Prefixes:
    return _weighted(torch.tensor(groups).cumsum(0).tolist(), matryoshka, device)


def _weighted(ends: Iterable[int], matryoshka: str, device: torch.device) -> Prefixes:
    """Prefixes with the weights that average ("mean") or sum ("sum") their errors."""
    placed = torch.tensor(ends, dtype=torch.int32).to(device)
    weight = 1 / len(placed) if matryoshka == "mean" else 1.0
    return Prefixes(placed, torch.full((len(placed),), weight, device=device))


def _random_ends(n_latents: int, n: int, seed: int, step: int) -> torch.Tensor:
    """n prefix sizes drawn by a Pareto law of power 1/2 on [1, F], ascending, then F itself."""
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFFFFFF)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    low = n_latents**-0.5
    sizes = (1 - u * (1 - low)) ** -2  # inverse of 1 - s^(-1/2), cut off at F
    ends = sizes.long().clamp(1, n_latents).sort().values
    return torch.cat([ends, torch.tensor([n_latents])])
