"""How the latents of crosscoders and cross-layer transcoders spread over layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from sae_kernels.nn import SparseAutoencoder


class LayerSpread(NamedTuple):
    """The layers that latents write to, by the squared norms of their decoder rows.

    Attributes:
        share: fp64 [S, n_layers], the mean share of each layer in a latent's squared norm, of the
            latents that read each of S layers; S = 1 where every latent reads all. Latents without
            a norm do not count.
        effective: fp64 [F], as many equally strong layers would have the same sum of squared
            shares: 1 where a latent writes to a single layer, 0 where it has no norm.
    """

    share: torch.Tensor
    effective: torch.Tensor

    def values(self) -> dict[str, Any]:
        """Summaries as JSON values."""
        live = self.effective[self.effective > 0]
        return {
            "share": self.share.tolist(),
            "effective_layers": float(live.mean()) if len(live) else None,
        }


@torch.no_grad()
def layer_spread(sae: SparseAutoencoder) -> LayerSpread | None:
    """How the latents of an SAE of several layers spread over them; None of one layer.

    Example:
        >>> from sae_kernels.nn import CrossLayerTopK
        >>> spread = layer_spread(CrossLayerTopK(8, 3 * 32, n_layers=3, k=4))
        >>> [[round(share, 2) for share in row] for row in spread.share.tolist()]
        [[0.33, 0.33, 0.33], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    """
    if sae.config.n_layers == 1:
        return None
    squares = sae.decoder_norms().double().square()
    total = squares.sum(1, keepdim=True)
    shares = torch.where(total > 0, squares / total, 0)
    groups = shares.unflatten(0, (getattr(sae.config, "n_sources", 1), -1))
    live = (groups.sum(2) > 0).sum(1, keepdim=True)
    concentration = shares.square().sum(1)
    effective = torch.where(concentration > 0, 1 / concentration, 0)
    return LayerSpread((groups.sum(1) / live.clamp(min=1)).cpu(), effective.cpu())
