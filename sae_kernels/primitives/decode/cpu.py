"""decode on the host kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    import torch


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
    blocks: int = 1,
) -> torch.Tensor:
    """Runs csrc/cpu/decode.cpp."""
    groups = 1 if group_ends is None else group_ends.shape[0]
    out = values.new_empty((groups, checks.n_tokens(values, offsets), W.shape[1]))
    codes = (values, indices, offsets)
    launch(codes, W, b_dec, group_ends, (None, None), (out, None, None), False, blocks)
    return out[0] if group_ends is None else out


def launch(
    codes: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    group_ends: torch.Tensor | None,
    compared: tuple[torch.Tensor | None, torch.Tensor | None],
    results: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    drop_zeros: bool,
    blocks: int,
) -> None:
    """Calls the kernel in its plain form, or in its fused form when there is a target.

    Args:
        codes: values, indices and, if ragged, offsets.
        W, b_dec, group_ends: as of decode.
        compared: weights of the groups, and the target.
        results: the output, squared errors and code gradients.
        drop_zeros: as of decode_residual.
        blocks: as of decode.
    """
    values, indices, offsets = codes
    checks.offsets_split_entries(offsets, indices.numel())
    checks.groups_split_latents(group_ends, W.shape[0])
    tensors = (*codes, W, b_dec, group_ends, *compared, *results)
    operands = [packed(t) for t in tensors]
    in_range = cpu.run(
        "decode",
        cpu.code(W.dtype),
        *operands,
        checks.n_tokens(values, offsets),
        1 if offsets is not None else values.shape[1],
        W.shape[1],
        W.shape[0],
        1 if group_ends is None else group_ends.shape[0],
        blocks,
        drop_zeros,
    )
    if not in_range:
        checks.latents_in_range(indices, W.shape[0])
