"""This package's own files as weights, like any other tool's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.formats.layout import Weights
from sae_kernels.nn import pretrained
from sae_kernels.nn.pretrained import CONFIG_FILE, WEIGHTS_FILE
from sae_kernels.nn.registry import from_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.io.tensor_files import Tensors

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "describe_native",
    "folded",
    "read_native",
    "write_native",
]


def read_native(path: str | Path) -> Weights:
    """Reads a folder that ``save_pretrained`` wrote; a scale of activations is folded in.

    Raises:
        DataError: what :func:`sae_kernels.nn.pretrained.load` refuses.
    """
    sae = pretrained.load(path)
    return folded(Weights(sae.config, dict(sae.state_dict()), sae.metadata))


def describe_native(folder: str | Path) -> SAEConfig:
    """What an SAE is, by its settings; no weights are read."""
    return pretrained.describe(Path(folder) / CONFIG_FILE).config


def folded(weights: Weights) -> Weights:
    """Folds an SAE's activation scale into its weights, so that it reads raw activations."""
    config = weights.config
    if config.activation_scale == 1 and config.target_scale == 1:
        return weights
    sae = from_weights(config, weights.tensors).folded()
    return Weights(sae.config, dict(sae.state_dict()), weights.metadata)


def write_native(
    folder: str | Path,
    config: SAEConfig,
    tensors: Tensors,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes what ``save_pretrained`` writes, complete or not at all.

    Args:
        folder: made when missing.
        config, tensors: the SAE, by our names, as `Weights` has them.
        metadata: where it comes from, as plain JSON values.
    """
    sae = from_weights(config, tensors)
    sae.metadata = dict(metadata or {})
    sae.save_pretrained(folder)
