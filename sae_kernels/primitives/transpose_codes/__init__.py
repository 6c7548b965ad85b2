"""The selected entries in latent order, built once a step for all who need it."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive()
def transpose_codes(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sorts the N flattened entries of codes by latent; equal latents keep their order.

    Args:
        indices: latents, int32 [B, K], or of any shape with ``row_ids``.
        values: fp32 or fp64, one per index, where entries of value 0 are dropped ones and left
            out; or None to take every entry.
        row_ids: int32, the token of each entry, or None for entry // K.
        n_latents: F.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        ``offsets`` [F + 1], ``entries`` [N] and ``rows`` [N], all int32. Latent f's entries are
        ``entries[offsets[f]:offsets[f + 1]]``, and ``rows`` holds the token of each. What lies past
        ``offsets[F]`` is zero and means nothing.
    """
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
    n = indices.numel()
    offsets, entries, rows = (result([size], torch.int32) for size in (n_latents + 1, n, n))
    return offsets, entries, rows
