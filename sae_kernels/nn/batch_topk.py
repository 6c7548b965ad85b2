"""BatchTopK: the k B largest latents of a batch; a threshold when there is no batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import functional
from sae_kernels.nn.sae import SparseAutoencoder
from sae_kernels.tensors import rounded_down

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.config import BatchTopKConfig


class BatchTopKSAE(SparseAutoencoder):
    """``x_hat = b_dec + W_dec^T batchtopk(W_enc (x - b_dec) + b_enc)`` (arXiv 2412.06410).

    In training mode the int(k B) largest positive pre-activations of the batch are kept; in
    evaluation mode every one above :attr:`threshold`, so that a token's codes do not depend on
    those around it.

    Attributes:
        threshold: fp64 scalar, what the smallest kept keys of training's batches were on average
            (see ``config.threshold_rule``); not positive while unset.

    Example:
        >>> from sae_kernels.nn import BatchTopKConfig, BatchTopKSAE
        >>> sae = BatchTopKSAE(BatchTopKConfig(d_in=8, n_latents=32, k=2.5))
        >>> sae.encode(torch.randn(100, 8)).values.shape
        torch.Size([250])
    """

    config: BatchTopKConfig
    keeps_dtype = ("threshold", "last_key")

    def __init__(self, config: BatchTopKConfig, **options: Any) -> None:
        super().__init__(config, **options)
        unset = -1.0 if config.threshold_rule == "dictionary_learning" else 0.0
        device = self.b_enc.device
        threshold = torch.full((), unset, dtype=torch.float64, device=device)
        self.register_buffer("threshold", threshold)
        # The next batch's is near it: a guess that saves work.
        last_key = torch.full((), torch.nan, dtype=torch.float64, device=device)
        self.register_buffer("last_key", last_key, persistent=False)

    threshold: torch.Tensor
    last_key: torch.Tensor

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.last_key.is_meta:  # it is not saved, so nothing has taken its place
            self.last_key = torch.full_like(self.threshold, torch.nan)

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> SparseCodes:
        """The largest pre-activations of the batch, or those above the threshold."""
        W_enc = self.W_enc if W_enc is None else W_enc
        scale = self.rank_scale()
        if not self.training:
            return self._above(x_centred, W_enc, self._bounds(scale))
        start = self.last_key if bool(self.last_key > 0) else None
        pre = functional.encode_batch_topk(
            x_centred,
            W_enc,
            self.b_enc,
            self.config.k if k is None else k,
            rank_scale=scale,
            start=start,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )
        self._note(pre, scale)
        return pre

    def _bounds(self, scale: torch.Tensor | None) -> torch.Tensor:
        """What pre-activations must be above, from the threshold of keys."""
        bound = self.threshold.clamp(min=0)
        if scale is None:
            return rounded_down(bound)
        return torch.where(scale > 0, rounded_down(bound / scale.double()), torch.inf)

    @torch.no_grad()
    def _note(self, pre: SparseCodes, scale: torch.Tensor | None) -> None:
        if pre.values.numel():
            key = pre.values if scale is None else pre.values * scale[pre.indices.long()]
            self.last_key.copy_(key.min())
        else:
            self.last_key.fill_(torch.nan)

    @torch.no_grad()
    def follow_threshold_(self, finite: torch.Tensor) -> None:
        """Moves :attr:`threshold` towards the last batch's smallest kept key.

        Training steps call it; nothing moves where the step was not ``finite``, and was skipped.
        dictionary_learning starts from the first key, SAELens from 0.
        """
        key, threshold = self.last_key, self.threshold
        keep = 0.999 if self.config.threshold_rule == "dictionary_learning" else 0.99
        moved = keep * threshold + (1 - keep) * key
        moved = torch.where(threshold < 0, key, moved)
        threshold.copy_(torch.where(key.isfinite() & finite, moved, threshold))

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """The threshold is a key: measured in pre-activations, or in targets if norms rank."""
        super().fold_vectors_(scale, target_scale)
        divisor = target_scale if self.config.rank_by_decoder_norm else scale
        self.threshold.copy_(
            torch.where(self.threshold > 0, self.threshold / divisor, self.threshold)
        )
