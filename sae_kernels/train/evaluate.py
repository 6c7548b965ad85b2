"""How good an SAE is on held-out activations."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from sae_kernels.train.batches import RowSource, TensorRows

if TYPE_CHECKING:
    from sae_kernels.nn import TopKSAE

DENSE = 0.1  # a latent that fires on more than this part of the tokens counts as dense


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Measures of an SAE on a set of activations.

    Attributes:
        n_tokens: how many tokens they were taken over.
        fvu: ``sum |x - x_hat|^2 / sum |x - mean(x)|^2``, the mean being that of this set.
        explained_variance: ``1 - fvu``.
        mse: squared error per token.
        l0: latents per token that fired.
        cosine: mean cosine similarity of x and x_hat.
        dead_fraction: part of the latents that fired on none of these tokens.
        dense_fraction: part of the latents that fired on more than a tenth of them.
        latent_density: [F], part of the tokens on which each latent fired.
    """

    n_tokens: int
    fvu: float
    explained_variance: float
    mse: float
    l0: float
    cosine: float
    dead_fraction: float
    dense_fraction: float
    latent_density: torch.Tensor

    def scalars(self) -> dict[str, float]:
        """Everything but the per-latent tensor, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["latent_density"]
        return values


@torch.inference_mode()
def evaluate(
    sae: TopKSAE, source: RowSource | torch.Tensor, *, batch_size: int = 4096
) -> Evaluation:
    """Reconstructs every row of the source once; sums are kept in fp64.

    Args:
        sae: the SAE.
        source: raw activations, a tensor [N, D] or a data set.
        batch_size: tokens at a time.

    Raises:
        ValueError: no rows, or rows of another width than the SAE's d_in.

    Example:
        >>> from sae_kernels.nn import TopKConfig, TopKSAE
        >>> sae = TopKSAE(TopKConfig(d_in=4, n_latents=8, k=2))
        >>> evaluate(sae, torch.randn(100, 4)).l0 <= 2
        True
    """
    source = TensorRows(source) if isinstance(source, torch.Tensor) else source
    if source.d_in != sae.config.d_in:
        raise ValueError(
            f"expected activations as wide as the SAE's d_in {sae.config.d_in}, got {source.d_in}"
        )
    n = source.n_tokens
    if n == 0:
        raise ValueError("expected at least one row to evaluate on, got none")
    device = sae.W_enc.device
    total = torch.zeros(sae.config.d_in, dtype=torch.float64, device=device)
    square = error = cosine = torch.zeros((), dtype=torch.float64, device=device)
    fired = torch.zeros(sae.config.n_latents, dtype=torch.int64, device=device)
    for start in range(0, n, batch_size):
        x = source.rows(start, min(start + batch_size, n)).activations.to(device).float()
        x_hat, codes = sae(x)
        total += x.sum(0, dtype=torch.float64)
        square = square + x.double().square().sum()
        error = error + (x - x_hat).double().square().sum()
        cosine = cosine + torch.cosine_similarity(x, x_hat, dim=1).sum(dtype=torch.float64)
        drop = sae.config.relu != "none"
        fired += codes.latent_order(drop_zeros=drop, backend=sae.backend).counts()
    variance = square - total.square().sum() / n
    fvu = float(error / variance)
    density = fired.double() / n
    return Evaluation(
        n_tokens=n,
        fvu=fvu,
        explained_variance=1 - fvu,
        mse=float(error / n),
        l0=int(fired.sum()) / n,
        cosine=float(cosine / n),
        dead_fraction=float((fired == 0).double().mean()),
        dense_fraction=float((density > DENSE).double().mean()),
        latent_density=density.float().cpu(),
    )
