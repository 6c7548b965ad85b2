"""transpose_codes: the selected entries in latent order, built once a step for all who need it.

Of the N flattened entries, those of latent f are ``entries[offsets[f]:offsets[f + 1]]`` in
ascending order, and ``rows`` holds the token (or ``row_ids[entry]``) of each. With ``values``
given, entries of value 0 are dropped ones and left out. ``entries`` and ``rows`` have room for all
N; what lies past ``offsets[F]`` is zero and means nothing.
"""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator


def _check(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> None:
    checks.indices("indices", indices)
    if row_ids is None:
        checks.shape("indices", indices, ["B", "K"], "tokens by kept entries")
    checks.shape("values", values, list(indices.shape), "one value per index")
    checks.dtype("values", values, (torch.float32, torch.float64))
    if row_ids is not None:
        checks.shape("row_ids", row_ids, list(indices.shape), "one row per index")
        checks.indices("row_ids", row_ids)
    checks.same_device(indices=indices, values=values, row_ids=row_ids)
    if n_latents < 1:
        raise ValueError(f"n_latents: expected at least 1, got {n_latents}")


def _fake(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = indices.numel()
    return indices.new_empty(n_latents + 1), indices.new_empty(n), indices.new_empty(n)


transpose_codes = Operator(
    "transpose_codes(Tensor indices, Tensor? values, Tensor? row_ids, SymInt n_latents,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _check,
    _fake,
)
