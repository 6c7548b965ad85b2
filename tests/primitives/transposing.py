"""Shared by the tests of transpose_codes: shapes, codes and a sort written out in Python."""

from __future__ import annotations

import torch

# B, K, F; the last but one has a segment for every entry, the last has a hot latent.
SHAPES = ((1, 1, 1), (0, 4, 9), (3, 5, 7), (40, 8, 33), (5, 1, 4000), (700, 3, 12))


def expected(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> list[list[tuple[int, int]]]:
    """Per latent its (entry, row) pairs, entries ascending."""
    by_latent: list[list[tuple[int, int]]] = [[] for _ in range(n_latents)]
    per_row = indices.shape[-1] if indices.dim() == 2 else 1
    rows = None if row_ids is None else row_ids.flatten().tolist()
    kept = None if values is None else values.flatten().tolist()
    for entry, latent in enumerate(indices.flatten().tolist()):
        if kept is None or kept[entry] != 0:
            by_latent[latent].append((entry, entry // per_row if rows is None else rows[entry]))
    return by_latent


def make(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices with latent 0 in every token, and values of which some are 0, -0 or NaN."""
    B, K, F = shape
    indices = torch.randint(0, F, (B, K), dtype=torch.int32)
    indices[:, 0] = 0
    values = torch.randn(B, K)
    values.flatten()[::3], values.flatten()[1::7] = 0.0, -0.0
    values.flatten()[5::11] = torch.nan
    return indices, values
