"""Matrices of a cross-layer architecture as the dense oracle has them, with what is masked as 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from sae_kernels.nn import CrossLayerConfig


def _places(config: CrossLayerConfig, name: str) -> tuple[Tensor, Tensor]:
    """The latent and the layer of each row of W_enc or W_dec."""
    if name == "W_enc":
        latents = torch.arange(config.n_latents)
        return latents, latents // (config.n_latents // config.n_sources)
    # Said anew: a latent of layer s writes to layer l if s <= l, s < l, or always.
    own = torch.arange(config.n_latents) // (config.n_latents // config.n_sources)
    rows = [
        (latent, layer)
        for layer in range(config.n_layers)
        for latent, source in enumerate(own.tolist())
        if {"weak": source <= layer, "strict": source < layer, "none": True}[config.causality]
    ]
    latents, layers = zip(*rows, strict=True)
    return torch.tensor(latents), torch.tensor(layers)


def whole(config: CrossLayerConfig, name: str, rows: Tensor) -> Tensor:
    """The rows of W_enc or W_dec as a matrix [F, n_layers * width]."""
    full = rows.new_zeros(config.n_latents, config.n_layers, rows.shape[1])
    full[_places(config, name)] = rows
    return full.flatten(1)


def rows_of(config: CrossLayerConfig, name: str, full: Tensor) -> Tensor:
    """The rows of W_enc or W_dec that a matrix [F, n_layers * width] has."""
    return full.unflatten(1, (config.n_layers, -1))[_places(config, name)]
