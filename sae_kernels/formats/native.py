"""This package's own files as weights, like any other tool's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.formats.layout import Weights
from sae_kernels.nn import pretrained
from sae_kernels.nn.pretrained import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "read_native"]


def read_native(path: str | Path) -> Weights:
    """Reads a folder that ``save_pretrained`` wrote, or a name on the Hugging Face hub.

    Raises:
        DataError: what :func:`sae_kernels.nn.pretrained.load` refuses.
    """
    sae = pretrained.load(path).folded()
    return Weights(sae.config, dict(sae.state_dict()), sae.metadata)
