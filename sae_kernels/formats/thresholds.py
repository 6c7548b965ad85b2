"""A threshold for every latent, as other tools' files hold them, out of ours."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from sae_kernels.config.sae import SAEConfig
from sae_kernels.nn import BatchTopKConfig, JumpReLUConfig
from sae_kernels.primitives.tensors import rounded_down

if TYPE_CHECKING:
    from sae_kernels.io.tensor_files import Tensors


def with_thresholds(tool: str, config: SAEConfig, tensors: Tensors) -> tuple[SAEConfig, Tensors]:
    """BatchTopK and log-threshold JumpReLU as a JumpReLU of thresholds; another SAE as it is.

    BatchTopK's single threshold becomes that of every latent, over the norms of the decoder's rows
    where they rank. Rounded down to fp32, it leaves comparisons with fp32 values as they were.

    Raises:
        ValueError: a BatchTopK threshold that is not set yet.
    """
    if isinstance(config, BatchTopKConfig):
        thresholds = _of_batch_topk(tool, config, tensors)
    elif isinstance(config, JumpReLUConfig) and config.log_threshold:
        thresholds = tensors["log_threshold"].exp()
    else:
        return config, tensors
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(SAEConfig)}
    kept = {n: t for n, t in tensors.items() if n not in ("threshold", "log_threshold")}
    return JumpReLUConfig(**shared, log_threshold=False), kept | {"threshold": thresholds}


def check_not_negative(tool: str, thresholds: torch.Tensor) -> None:
    """Raises ValueError for a threshold below 0, for a tool that has a ReLU as well."""
    if (lowest := float(thresholds.min())) < 0:
        raise ValueError(
            f"{tool}: expected thresholds of at least 0, got {lowest}: it would lose the latent's "
            "negative codes"
        )


def _of_batch_topk(tool: str, config: BatchTopKConfig, tensors: Tensors) -> torch.Tensor:
    threshold = tensors["threshold"].double()
    if threshold < 0:
        raise ValueError(
            f"{tool}: expected a threshold of at least 0, got {float(threshold)}: it is not set "
            "yet; train for some more steps first"
        )
    if config.rank_by_decoder_norm:
        norms = torch.linalg.vector_norm(tensors["W_dec"], dim=1, dtype=torch.float64)
        exact = torch.where(norms > 0, threshold / norms, torch.inf)
    else:
        exact = threshold.expand(config.n_latents)
    return rounded_down(exact.clamp(max=torch.finfo(torch.float32).max))
