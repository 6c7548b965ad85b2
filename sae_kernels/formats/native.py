"""This package's own folder: ``config.json`` and ``sae.safetensors``; no pickle anywhere."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from sae_kernels._version import __version__
from sae_kernels.errors import DataError
from sae_kernels.files import json_writer, publish_all
from sae_kernels.formats.files import read_settings, stored_safetensors
from sae_kernels.formats.layout import configure, shapes
from sae_kernels.nn.architectures import CONFIGS, build
from sae_kernels.primitives.checks import OPERAND_DTYPES

if TYPE_CHECKING:
    from sae_kernels.nn.config import SAEConfig
    from sae_kernels.nn.sae import SparseAutoencoder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"


def save(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Writes both files, each complete or not at all: a failed save leaves what was there."""
    weights = {name: t.detach().cpu().contiguous() for name, t in sae.state_dict().items()}
    save_weights = functools.partial(save_file, weights)
    config = json_writer(config_values(sae.config))
    publish_all(folder, {WEIGHTS_FILE: save_weights, CONFIG_FILE: config})


def config_values(config: SAEConfig) -> dict[str, Any]:
    """What ``config.json`` says of an SAE."""
    return {
        "architecture": config.architecture,
        "sae_kernels_version": __version__,
        **config.to_dict(),
    }


def load(
    name_or_path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> SparseAutoencoder:
    """Reads both files from a folder, or from the hub for a name that is no folder.

    Raises:
        DataError: files missing or damaged, unknown configuration, weights of other shapes than
            the configuration says, or weights that are not finite.
    """
    config_path, weights_path = _files(str(name_or_path), revision, local_files_only)
    config = _read_config(config_path)
    stored = stored_safetensors(weights_path)
    came = {name: list(size) for name, size in stored.sizes.items()}
    expected = {name: list(size) for name, size in shapes(config).items()}
    if expected != came:
        raise DataError(f"{weights_path}: expected tensors {expected}, got {came!s:.500}")
    weights = stored.load()
    with torch.device("meta"):
        sae = build(config)
    _check_dtypes(sae, weights, weights_path)
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise DataError(
                f"{weights_path}: expected finite weights, {name} holds NaN or infinity; "
                "use an earlier checkpoint"
            )
    sae.load_state_dict(weights, assign=True)
    return sae


def _check_dtypes(sae: SparseAutoencoder, weights: dict[str, torch.Tensor], path: Path) -> None:
    own = {name: t.dtype for name, t in sae.state_dict().items() if name in sae.keeps_dtype}
    for name, dtype in own.items():
        if weights[name].dtype != dtype:
            raise DataError(f"{path}: expected {name} in {dtype}, got {weights[name].dtype}")
    dtypes = {str(tensor.dtype) for name, tensor in weights.items() if name not in own}
    if len(dtypes) > 1 or not dtypes <= {str(dtype) for dtype in OPERAND_DTYPES}:
        raise DataError(
            f"{path}: expected weights of one floating point dtype, got {', '.join(sorted(dtypes))}"
        )


def _files(name: str, revision: str | None, local_files_only: bool) -> tuple[Path, Path]:
    folder = Path(name)
    if folder.is_dir():
        paths = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path}: expected the file of a saved SAE, it is not there")
        return paths
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise DataError(f"{name}: expected a folder with a saved SAE or a hub name owner/repo")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config, weights = (
            Path(hf_hub_download(name, file, revision=revision, local_files_only=local_files_only))
            for file in (CONFIG_FILE, WEIGHTS_FILE)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name}: no such folder, and the Hugging Face hub did not give it ({reason})"
        ) from error
    return config, weights


def _read_config(path: Path) -> SAEConfig:
    values = read_settings(path)
    values.pop("sae_kernels_version", None)
    architecture = values.pop("architecture", None)
    if not isinstance(architecture, str) or architecture not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise DataError(f"{path}: expected architecture {known}, got {architecture!r:.80}")
    from_dict = CONFIGS[architecture].from_dict
    return configure(path, lambda **own: from_dict(own), **values)
