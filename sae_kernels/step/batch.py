"""What both training routes do with a batch before the objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae_kernels.nn import SparseAutoencoder


def checked_batch(
    sae: SparseAutoencoder, x: torch.Tensor, target: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens and their targets in fp32 and in the scale of training.

    Raises:
        ValueError: not [B, input width] and [B, output width] with at least one token; a target
            where the input is its own, or none where it is not.
    """
    config = sae.config
    if x.dim() != 2 or x.shape[1] != config.input_width or x.shape[0] == 0:
        raise ValueError(
            f"x: expected shape [B, {config.input_width}] with B > 0 (tokens by "
            f"{_widths('d_in', config.d_in, config.n_layers)}), got {list(x.shape)}"
        )
    x = _scaled(x.float(), config.activation_scale)
    if not config.transcodes:
        if target is not None:
            raise ValueError("target: expected none, the SAE reconstructs its input; got one")
        return x, x
    if target is None:
        raise ValueError("target: expected what the transcoder is to reconstruct, got None")
    if target.shape != (x.shape[0], config.output_width):
        raise ValueError(
            f"target: expected shape [{x.shape[0]}, {config.output_width}] (a row per token), got "
            f"{list(target.shape)}"
        )
    return x, _scaled(target.float(), config.target_scale)


def _widths(name: str, width: int, n_layers: int) -> str:
    return name if n_layers == 1 else f"{n_layers} layers of {name} = {width}"


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else x * scale


def loss_scale(
    x: torch.Tensor, loss: str, scratch: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What multiplies the squared error, and the batch's total variance about its mean.

    Sums go by token first, so that they do not depend on the number of threads.
    """
    deviation = torch.sub(x, x.mean(0), out=scratch)
    variance = deviation.square_().sum(1).sum()
    return (1 / variance if loss == "fvu" else torch.ones_like(variance) / x.shape[0]), variance
