"""This package's own files as weights, like any other tool's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.formats.layout import Weights
from sae_kernels.nn import pretrained
from sae_kernels.nn.pretrained import CONFIG_FILE, WEIGHTS_FILE
from sae_kernels.nn.registry import from_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.io.tensor_files import Tensors

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "read_native", "write_native"]


def read_native(path: str | Path) -> Weights:
    """Reads a folder that ``save_pretrained`` wrote; a scale of activations is folded in.

    Raises:
        DataError: what :func:`sae_kernels.nn.pretrained.load` refuses.
    """
    sae = pretrained.load(path)
    if sae.config.activation_scale != 1 or sae.target_scale != 1:  # of a checkpoint
        sae = sae.folded()
    return Weights(sae.config, dict(sae.state_dict()), sae.metadata)


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
