"""Model diffing with a crosscoder of two models: which latents are shared, and which one's own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.analyze.geometry import summary
from sae_kernels.data.sources import open_rows
from sae_kernels.primitives import checks
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.training.evaluate import evaluating

if TYPE_CHECKING:
    from torch import Tensor

    from sae_kernels.data.sources import Stored
    from sae_kernels.nn import SparseAutoencoder

ONLY, SHARED = 0.1, 0.1  # distance of the relative norm from an end, and from the middle
NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
_BATCH = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
    """Comparison of two models by their crosscoder: whose each latent is (arXiv 2504.02922).

    Attributes:
        relative_norm: fp32 [F], ``((|d_1| - |d_0|) / max(|d_0|, |d_1|) + 1) / 2`` of the decoder's
            parts: 0 for a latent that only the first model (base) has, 1 for one of the second
            (chat), NaN where both are 0.
        nu_error: fp64 [F], of :func:`latent_scaling`; None without data.
        nu_reconstruction: the same.
    """

    relative_norm: Tensor
    nu_error: Tensor | None = None
    nu_reconstruction: Tensor | None = None

    @property
    def base_only(self) -> Tensor:
        """Latents whose relative norm is at most 0.1, bool [F]."""
        return self.relative_norm <= ONLY

    @property
    def chat_only(self) -> Tensor:
        """Latents whose relative norm is at least 0.9, bool [F]."""
        return self.relative_norm >= 1 - ONLY

    @property
    def shared(self) -> Tensor:
        """Latents whose relative norm is from 0.4 to 0.6, bool [F]."""
        return (self.relative_norm - 0.5).abs() <= SHARED

    @property
    def truly_own(self) -> Tensor | None:
        """Latents of one model that latent scaling confirms, bool [F]: the other lacks them.

        ``nu_error < 0.2`` (the other model's error does not hold them) and ``nu_reconstruction <
        0.5`` (nor do its other latents).
        """
        if self.nu_error is None or self.nu_reconstruction is None:
            return None
        apart = (self.nu_error < NU_ERROR) & (self.nu_reconstruction < NU_RECONSTRUCTION)
        return (self.base_only | self.chat_only) & apart

    def values(self) -> dict[str, Any]:
        """Counts and summaries as JSON values."""
        kinds = {name: getattr(self, name) for name in ("base_only", "chat_only", "shared")}
        found: dict[str, Any] = {name: int(mask.sum()) for name, mask in kinds.items()}
        found["relative_norm"] = summary(self.relative_norm)
        own = self.truly_own
        if own is not None:
            found["truly_base_only"] = int((own & self.base_only).sum())
            found["truly_chat_only"] = int((own & self.chat_only).sum())
        return found


def difference(sae: SparseAutoencoder, source: Stored | None = None) -> Difference:
    """The relative decoder norms of a crosscoder's latents and, given data, their latent scaling.

    Args:
        sae: a crosscoder of two models, the base model first, trained with
            ``unit_norm_decoder=False``: unit norms are equal and say nothing.
        source: raw activations [N, 2 D] of both models for the same tokens, side by side; a folder,
            too.

    Raises:
        ValueError: no crosscoder of two.

    Example:
        >>> from sae_kernels.nn import TopKSAE
        >>> sae = TopKSAE(8, 32, k=4, n_layers=2)
        >>> found = difference(sae, torch.randn(100, 16))
        >>> found.relative_norm.shape, found.nu_error.shape
        (torch.Size([32]), torch.Size([32]))
    """
    _check(sae)
    base, chat = sae.decoder_norms().detach().T
    relative = ((chat - base) / torch.maximum(base, chat) + 1) / 2
    return Difference(relative, *(latent_scaling(sae, source) if source is not None else ()))


@torch.no_grad()
def latent_scaling(sae: SparseAutoencoder, source: Stored) -> tuple[Tensor, Tensor]:
    """How much of each latent is in the other model, relative to its own: nu_error and nu_recon.

    A latent's own model m is that with the larger decoder part d, o the other one. For a target y
    of one model, ``beta(y) = argmin_b sum_t |b a_t d - y_t|^2 = sum_t a_t <d, y_t> / (|d|^2 sum_t
    a_t^2)``, a_t being the latent's value. ``nu = beta(y_o) / beta(y_m)`` with, in turn, y the
    error that a model's reconstruction has without this latent, and y its reconstruction without
    bias. A latent that only seems to be one model's has a large nu_error (its own part of o
    was shrunk to nothing) or a large nu_reconstruction (other latents say the same in o).

    Only kept entries are computed: no [N, F] and no [F, D] sums.

    Args:
        sae: a crosscoder of two models.
        source: raw activations [N, 2 D].

    Returns:
        fp64 [F] each; NaN for a latent that never fired.
    """
    _check(sae)
    source = open_rows(source)
    F, D = sae.config.n_latents, sae.config.d_in
    W = sae.decoder_rows().detach()
    parts = [W[:, :D].contiguous(), W[:, D:].contiguous()]
    base, chat = sae.decoder_norms().T
    of_chat = chat > base
    own = torch.where(of_chat[:, None], parts[1], parts[0]).contiguous()
    dots = torch.stack([(own * part).to(torch.float64).sum(1) for part in parts])  # <d, d_of_model>
    sums = torch.zeros(2, 2, F, dtype=torch.float64, device=W.device)  # target, model, latent
    squares = torch.zeros(F, dtype=torch.float64, device=W.device)
    with evaluating(sae):
        for start in range(0, source.n_tokens, _BATCH):
            rows = source.rows(start, min(start + _BATCH, source.n_tokens))
            x = rows.activations.to(W.device)
            codes = sae.encode(x)
            x_hat = sae.decode(codes)
            error = (x.to(x_hat.dtype) - x_hat) * sae.target_scale
            latents, values = codes.indices.long().flatten(), codes.values.double().flatten()
            squares.index_add_(0, latents, values.square())
            for model, columns in enumerate((slice(0, D), slice(D, 2 * D))):
                recon = x_hat[:, columns] * sae.target_scale - sae.b_dec[columns]
                for target, y in enumerate((error[:, columns], recon)):
                    y = y.to(checks.accumulator(W.dtype)).contiguous()
                    along = code_grad(y, codes.indices, own, None, codes.offsets).double()
                    sums[target, model].index_add_(0, latents, along.flatten() * values)
    sums[0] += squares * dots  # the latent's own contribution, which its error is without
    ratios = torch.where(of_chat, sums[:, 0] / sums[:, 1], sums[:, 1] / sums[:, 0])
    ratios[:, squares == 0] = torch.nan
    return ratios[0], ratios[1]


def _check(sae: SparseAutoencoder) -> None:
    if sae.config.n_layers != 2 or sae.config.transcodes:
        raise ValueError(
            "sae: expected a crosscoder of two models (n_layers=2), got one with n_layers = "
            f"{sae.config.n_layers}"
        )
