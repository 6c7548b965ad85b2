"""This package's own folder: ``config.json``, ``sae.safetensors`` and a card; no pickle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file

from sae_kernels._version import __version__
from sae_kernels.errors import DataError
from sae_kernels.io import hub
from sae_kernels.io.files import json_writer, publish_all
from sae_kernels.io.hub import HubPlace
from sae_kernels.io.tensor_files import check_integers, read_settings, stored_safetensors
from sae_kernels.nn.card import CARD_FILE, MARK, card
from sae_kernels.nn.registry import architecture, build
from sae_kernels.primitives.checks import OPERAND_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.nn.base import SparseAutoencoder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "sae.safetensors"
_CARD_START = 4096  # characters, among which the mark stands


class Described(NamedTuple):
    """Contents of a ``config.json``.

    Attributes:
        config: what the SAE is.
        metadata: where it comes from, as plain JSON values.
    """

    config: SAEConfig
    metadata: dict[str, Any]


def save(
    sae: SparseAutoencoder,
    folder: str | Path,
    name: str | None = None,
    write_weights: Callable[[Path], object] | None = None,
) -> None:
    """Writes all files, each complete or not at all: a failed save leaves what was there.

    A README.md that is there and is not a card of ours stays.

    Args:
        sae: what to save, as it is.
        folder: made when missing.
        name: how the card says to load it; None is the folder's name.
        write_weights: writes the file of the weights; None: from this module, which has all.
    """
    if write_weights is None:
        weights = {name: t.detach().cpu().contiguous() for name, t in sae.state_dict().items()}
        write_weights = functools.partial(save_file, weights)
    files: dict[str, Callable[[Path], object]] = {
        WEIGHTS_FILE: write_weights,
        CONFIG_FILE: json_writer(config_values(sae.config, sae.metadata)),
    }
    if _is_ours(Path(folder, CARD_FILE)):
        text = card(sae, name or Path(folder).name or "path/to/this/folder")
        files[CARD_FILE] = lambda path: path.write_text(text, encoding="utf-8")
    publish_all(folder, files)


def _is_ours(path: Path) -> bool:
    """Whether a card may be written here: nothing is there, or a card of ours."""
    try:
        with path.open(encoding="utf-8") as file:
            return MARK in file.read(_CARD_START)
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


def upload(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Uploads all files of a folder to the hub, in one commit, whose address it returns."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=str(folder),
        revision=revision,
        commit_message=commit_message,
    )
    return str(commit.commit_url)


def config_values(config: SAEConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    """Contents of the ``config.json`` of an SAE, ready for JSON."""
    return {
        "architecture": config.architecture,
        "sae_kernels_version": __version__,
        **config.to_dict(),
        **({"metadata": metadata} if metadata else {}),
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
    config, metadata = describe(config_path)
    weights = _weights(config, weights_path)
    with torch.device("meta"):
        sae = build(config)
    _check_dtypes(sae, weights, weights_path)
    _check_finite(weights, weights_path)
    sae.load_state_dict(weights, assign=True)
    sae.metadata = metadata
    return sae


def describe(path: Path) -> Described:
    """Reads a ``config.json``; nothing is allocated.

    Raises:
        DataError: no such file, an unknown architecture, with the known ones, or settings that it
            refuses.
    """
    values = read_settings(path)
    values.pop("sae_kernels_version", None)
    metadata = values.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: metadata: expected a JSON object, got {metadata!r:.80}")
    check_integers(path, values)
    try:
        kind = architecture(values.pop("architecture", None))
        return Described(kind.config_class.from_dict(values), metadata)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error!s:.500}") from error


def _weights(config: SAEConfig, path: Path) -> dict[str, torch.Tensor]:
    stored = stored_safetensors(path)
    came = {name: list(size) for name, size in stored.sizes.items()}
    expected = {name: list(size) for name, size in config.shapes().items()}
    if expected != came:
        raise DataError(f"{path}: expected tensors {expected}, got {came!s:.500}")
    return stored.load()


def _check_finite(weights: dict[str, torch.Tensor], path: Path) -> None:
    for name, tensor in weights.items():
        if not is_sound(name, tensor):
            raise DataError(
                f"{path}: expected finite weights, {name} holds NaN or infinity; "
                "use an earlier checkpoint"
            )


def is_sound(name: str, tensor: torch.Tensor) -> bool:
    """Whether a file's tensor is finite; the threshold of a latent may be +inf: it never fires.

    Example:
        >>> never = torch.tensor([1.0, torch.inf])
        >>> is_sound("threshold", never), is_sound("b_enc", never)
        (True, False)
    """
    if name.rpartition(".")[2] in ("threshold", "log_threshold") and tensor.ndim == 1:
        return bool((tensor > -torch.inf).all())
    return bool(tensor.isfinite().all())


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
                raise DataError(
                    f"{path}: expected the file of a saved SAE, it is not there; "
                    "sae_kernels.load reads the folders of other tools"
                )
        return paths
    place = HubPlace.of(name)
    if place is None or place.inside:
        raise DataError(
            f"{name}: expected a folder with a saved SAE or a hub name owner/repo; "
            "sae_kernels.load reads other files too"
        )
    files = (CONFIG_FILE, WEIGHTS_FILE)
    config, weights = hub.download(place.repository, files, revision, local_files_only)
    return config, weights
