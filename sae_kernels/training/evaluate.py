"""Evaluation of an SAE on held-out activations: FVU, L0, density, description length."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.data.joint import JointRows
from sae_kernels.data.sources import open_rows
from sae_kernels.training.description_length import DescriptionLengthSums
from sae_kernels.training.fresh import split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_kernels.data.rows import RowSource
    from sae_kernels.data.sources import Stored
    from sae_kernels.nn import SparseAutoencoder

DENSE = 0.1  # a latent that fires on more than this part of the tokens counts as dense


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Measures of an SAE on a set of activations.

    Attributes:
        n_tokens: number of tokens.
        fvu: ``sum |x - x_hat|^2 / sum |x - mean(x)|^2``, the mean being that of this set.
        row_fvu: the mean over rows of ``|x - x_hat|^2 / |x - mean(x)|^2``, with the same mean. In
            ``fvu`` a few rows of enormous norm count for more than all others; here each row counts
            alike. Rows that lie at the mean, which have nothing to explain, are left out of it.
        explained_variance: ``1 - fvu``.
        mse: squared error per token, summed over coordinates.
        l0: latents per token that fired.
        cosine: mean cosine similarity of x and x_hat.
        dead_fraction: fraction of the latents that fired on none of these tokens.
        dense_fraction: fraction of the latents that fired on more than a tenth of them.
        bits_codes, bits_residual, bits_per_token, bits_without_sae: description length per token,
            see :class:`~sae_kernels.training.description_length.DescriptionLengthSums`.
        layer_fvu: FVU of each layer of a crosscoder; else empty.
        latent_density: fp32 [F], fraction of the tokens on which each latent fired.
    """

    n_tokens: int
    fvu: float
    row_fvu: float
    explained_variance: float
    mse: float
    l0: float
    cosine: float
    dead_fraction: float
    dense_fraction: float
    bits_codes: float
    bits_residual: float
    bits_per_token: float
    bits_without_sae: float
    layer_fvu: tuple[float, ...]
    latent_density: torch.Tensor

    def scalars(self) -> dict[str, Any]:
        """All measures but the per-latent tensor, by name, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["latent_density"]
        return values if self.layer_fvu else {k: v for k, v in values.items() if k != "layer_fvu"}


def evaluate(
    sae: SparseAutoencoder,
    source: Stored,
    *,
    target: Stored | None = None,
    batch_size: int = 4096,
) -> Evaluation:
    """Measures an SAE on every row of a source, in evaluation mode, with sums in fp64.

    The source is read twice: first for its mean, then through the SAE.

    Args:
        sae: an SAE of any architecture; its mode is restored.
        source: raw activations, a tensor [N, D], a folder or a row source; a crosscoder's layers
            side by side (:class:`~sae_kernels.data.JointRows`).
        target: a transcoder's target activations, of the same tokens; all measures are of it.
        batch_size: tokens per batch.

    Raises:
        ValueError: no rows, rows of another width than the SAE's d_in, a transcoder without its
            target or a target for another SAE.
        TypeError: batches that can be read once only.
        DataError: a folder without activations.

    Example:
        >>> from sae_kernels.nn import TopKConfig, TopKSAE
        >>> sae = TopKSAE(TopKConfig(d_in=4, n_latents=8, k=2))
        >>> evaluate(sae, torch.randn(100, 4)).l0 <= 2
        True
    """
    rows = open_rows(source)
    config = sae.config
    if config.transcodes != (target is not None):
        came = "none for a transcoder" if target is None else "one for an SAE of its input"
        raise ValueError(f"target: expected one for a transcoder and none else, got {came}")
    if rows.d_in != config.input_width:
        layers = f" times {config.n_layers} layers" if config.n_layers > 1 else ""
        raise ValueError(
            f"expected activations as wide as the SAE's d_in {config.d_in}{layers}, got {rows.d_in}"
        )
    if rows.n_tokens == 0:
        raise ValueError("expected at least one row to evaluate on, got none")
    if target is not None:
        rows = JointRows([rows, open_rows(target)])
        if rows.d_in != config.input_width + config.output_width:
            raise ValueError(
                f"target: expected activations as wide as the SAE's output {config.output_width}, "
                f"got {rows.d_in - config.input_width}"
            )
    with evaluating(sae):
        return _evaluate(sae, rows, batch_size)


@contextmanager
def evaluating(sae: SparseAutoencoder) -> Iterator[None]:
    """Evaluation mode in the block; the mode before is restored."""
    training = sae.training
    sae.eval()
    try:
        yield
    finally:
        sae.train(training)


@torch.inference_mode()
def _evaluate(sae: SparseAutoencoder, source: RowSource, batch_size: int) -> Evaluation:
    n, device = source.n_tokens, sae.W_enc.device
    mean = _target_mean(sae, source, batch_size)
    cosine, ratios, varying = torch.zeros(3, dtype=torch.float64, device=device)
    fired = torch.zeros(sae.config.n_latents, dtype=torch.int64, device=device)
    sums = DescriptionLengthSums(sae.config.output_width, sae.config.n_latents, device)
    for x, target in _batches(sae, source, batch_size):
        x_hat, codes = sae(x)
        cosine = cosine + torch.cosine_similarity(target, x_hat, dim=1).sum(dtype=torch.float64)
        fired += codes.latent_order(drop_zeros=sae.drops_zeros, backend=sae.backend).counts()
        sums.update(target, x_hat, codes)
        squared = (target.double() - mean).square().sum(1)
        away = squared != 0  # of NaN, too, which must show
        error = (target - x_hat).double().square().sum(1)
        ratios = ratios + (error[away] / squared[away]).sum()
        varying = varying + away.sum()
    layers = sae.config.n_layers
    errors = sums.residual.square.view(layers, -1).sum(1)
    variances = n * sums.activations.variance().view(layers, -1).sum(1)
    total = errors.sum()
    fvu = float(total / variances.sum())
    bits = sums.result(sae.decoder_norms().norm(dim=1) / sae.target_scale)
    density = fired.double() / n
    return Evaluation(
        n_tokens=n,
        fvu=fvu,
        row_fvu=float(ratios / varying),
        explained_variance=1 - fvu,
        mse=float(total / n),
        l0=int(fired.sum()) / n,
        cosine=float(cosine / n),
        dead_fraction=float((fired == 0).double().mean()),
        dense_fraction=float((density > DENSE).double().mean()),
        bits_codes=bits.bits_codes,
        bits_residual=bits.bits_residual,
        bits_per_token=bits.bits_per_token,
        bits_without_sae=bits.bits_without_sae,
        layer_fvu=tuple((errors / variances).tolist()) if layers > 1 else (),
        latent_density=density.float().cpu(),
    )


def _batches(
    sae: SparseAutoencoder, source: RowSource, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of what the SAE reads and what it is to reconstruct, fp32 on its device."""
    for start in range(0, source.n_tokens, batch_size):
        rows = source.rows(start, min(start + batch_size, source.n_tokens)).activations
        x, target = split(rows.to(sae.W_enc.device).float(), sae.config)
        yield x, x if target is None else target


def _target_mean(sae: SparseAutoencoder, source: RowSource, batch_size: int) -> torch.Tensor:
    """The mean, fp64, of what the SAE is to reconstruct."""
    totals = (target.sum(0, dtype=torch.float64) for _, target in _batches(sae, source, batch_size))
    return functools.reduce(torch.add, totals) / source.n_tokens
