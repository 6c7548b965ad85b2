"""This package's own folder: ``config.json`` and ``sae.safetensors``; no pickle anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_kernels._version import __version__
from sae_kernels.errors import DataError
from sae_kernels.nn.config import TopKConfig

if TYPE_CHECKING:
    from sae_kernels.nn.topk import TopKSAE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"
ARCHITECTURE = "topk"


def save(sae: TopKSAE, folder: str | Path) -> None:
    """Writes both files, each complete or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().cpu().contiguous() for name, t in sae.state_dict().items()}
    partial = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
    save_file(weights, partial)
    os.replace(partial, folder / WEIGHTS_FILE)
    config = {
        "architecture": ARCHITECTURE,
        "sae_kernels_version": __version__,
        **sae.config.to_dict(),
    }
    partial = folder / f".{CONFIG_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, folder / CONFIG_FILE)


def load(
    name_or_path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> TopKSAE:
    """Reads both files from a folder, or from the hub for a name that is no folder.

    Raises:
        DataError: files missing or damaged, unknown configuration, weights of other shapes than
            the configuration says, or weights that are not finite.
    """
    from sae_kernels.nn.topk import TopKSAE

    config_path, weights_path = _files(str(name_or_path), revision, local_files_only)
    config = _read_config(config_path)
    weights = _read_weights(weights_path)
    with torch.device("meta"):
        sae = TopKSAE(config)
    expected = {name: list(t.shape) for name, t in sae.state_dict().items()}
    came = {name: list(t.shape) for name, t in weights.items()}
    if expected != came:
        raise DataError(f"{weights_path}: expected tensors {expected}, got {came}")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise DataError(
                f"{weights_path}: expected finite weights, {name} holds NaN or infinity; "
                "use an earlier checkpoint"
            )
    sae.load_state_dict(weights, assign=True)
    return sae


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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config, weights = (
            Path(
                hf_hub_download(
                    name, file, revision=revision, local_files_only=local_files_only
                )
            )
            for file in (CONFIG_FILE, WEIGHTS_FILE)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name}: no such folder, and the Hugging Face hub did not give it ({reason})"
        ) from error
    return config, weights


def _read_config(path: Path) -> TopKConfig:
    try:
        values: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON object ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(values).__name__}")
    values.pop("sae_kernels_version", None)
    architecture = values.pop("architecture", None)
    if architecture != ARCHITECTURE:
        raise DataError(f"{path}: expected architecture {ARCHITECTURE!r}, got {architecture!r}")
    try:
        return TopKConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: expected a safetensors file, it cannot be read ({error})"
        ) from error
