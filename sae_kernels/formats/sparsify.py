"""EleutherAI sparsify's folders, one a hook point: ``cfg.json`` and ``sae.safetensors``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from sae_kernels.errors import DataError
from sae_kernels.formats.layout import (
    Weights,
    configure,
    from_foreign,
    load,
    only_raw_activations,
    to_foreign,
)
from sae_kernels.formats.origin import described, own_fields, own_of, rest
from sae_kernels.io.files import json_writer, publish_all
from sae_kernels.io.tensor_files import (
    Tensors,
    flag,
    read_settings,
    stored_safetensors,
    whole,
)
from sae_kernels.nn import TopKConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.nn import SAEConfig

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
# Of which the configuration says all.
_READ = (
    *("activation", "signed", "normalize_decoder", "num_latents", "k", "skip_connection"),
    *("transcode", "d_in"),
)
_HOOK_POINT = re.compile(r"([a-z_]+\.)+\d+(\.[a-z_]+)*", re.ASCII)  # sparsify names folders so
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}


def read_sparsify(folder: str | Path) -> Weights:
    """Reads a sparse coder of sparsify: an SAE, a transcoder or a skip transcoder.

    The folder's name is the layer, as sparsify gives it. Matrices lie as here. ReLU comes before
    the selection; b_dec is subtracted from the input unless the coder transcodes; ``num_latents`` 0
    stands for ``d_in * expansion_factor``. A key that is missing has sparsify's default.

    Raises:
        DataError: files missing or damaged, another activation than top-k (groupmax, signed),
            tensors that are not what the configuration says.

    Example:
        >>> import tempfile, torch
        >>> config = TopKConfig(2, 4, k=1, relu="before")
        >>> tensors = {name: torch.zeros(size) for name, size in config.shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_sparsify(folder, config, tensors)
        ...     read_sparsify(folder).config == config
        True
    """
    folder = Path(folder)
    path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    values = read_settings(path)
    config = _config(path, values)
    names = _names(config)
    found = load(stored_safetensors(weights), config, names)
    layer = folder.name if _HOOK_POINT.fullmatch(folder.name) else None
    metadata = described("sparsify", own_fields(path, values, _READ), layer=layer)
    return Weights(config, from_foreign(weights, config, names, found), metadata)


def describe_sparsify(folder: str | Path) -> SAEConfig:
    """What a sparse coder is, by its settings; no weights are read."""
    path = Path(folder) / CONFIG_FILE
    return _config(path, read_settings(path))


def write_sparsify(
    folder: str | Path,
    config: SAEConfig,
    tensors: Tensors,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a TopK SAE or (skip) transcoder for sparsify, complete or not at all.

    Groups of a Matryoshka SAE matter to training alone and are not part of the format.

    Args:
        folder: made when missing; its two files are replaced.
        config, tensors: the SAE, by our names, as `Weights` has them.
        metadata: settings that a file of sparsify held (``"sparsify"``) are written back. The
            format has no place for a model or a layer, and the rest is there for us alone: sparsify
            names the folder after the layer.

    Raises:
        ValueError: an SAE that sparsify cannot hold; the message says why.
        DataError: tensors that are not what the configuration says.

    Example:
        >>> from sae_kernels.nn import ReLUConfig
        >>> write_sparsify("nowhere", ReLUConfig(2, 4), {})
        Traceback (most recent call last):
        ValueError: sparsify: expected a TopK SAE, got ReLUConfig
    """
    only_raw_activations("sparsify", config)
    values = _values(config, own_of(metadata, "sparsify", _READ)) | rest(metadata, "sparsify")
    theirs = to_foreign("tensors", config, _names(config), tensors)
    publish_all(
        folder,
        {
            WEIGHTS_FILE: lambda path: save_file(theirs, path),
            CONFIG_FILE: json_writer(values),
        },
    )


def _names(config: SAEConfig) -> dict[str, str]:
    return {name: _NAMES.get(name, name) for name in config.shapes()}


def _config(path: Path, values: dict[str, Any]) -> SAEConfig:
    if (activation := values.get("activation", "topk")) != "topk":
        raise DataError(
            f"{path}: activation: expected 'topk', got {activation!r:.40}: groupmax keeps the "
            "largest latent of each of k groups, which no SAE here does"
        )
    if flag(path, values, "signed", False):
        raise DataError(
            f"{path}: signed: expected false, got true: latents are ranked by their magnitude, "
            "which no SAE here does"
        )
    transcode = flag(path, values, "transcode", False)
    skip = flag(path, values, "skip_connection", False)
    if skip and not transcode:
        raise DataError(
            f"{path}: skip_connection: expected false without transcode, got true: an SAE here "
            "has no skip connection"
        )
    d_in = whole(path, values, "d_in")
    return configure(
        path,
        TopKConfig,
        d_in=d_in,
        n_latents=whole(path, values, "num_latents", 0)
        or d_in * whole(path, values, "expansion_factor", 32),
        k=whole(path, values, "k", 32),
        relu="before",
        d_out=d_in if transcode else None,
        skip=skip,
        subtract_b_dec=not transcode,
        unit_norm_decoder=flag(path, values, "normalize_decoder", True),
    )


def _values(config: SAEConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, TopKConfig):
        raise ValueError(f"sparsify: expected a TopK SAE, got {type(config).__name__}")
    for fits, expected in (
        (config.relu != "none", "relu 'before' or 'after', got 'none': it drops negative values"),
        (
            not config.rank_by_decoder_norm,
            "rank_by_decoder_norm false, got true: multiply W_enc and b_enc by the norms of the "
            "decoder's rows and divide the rows by them first; codes grow by the norms",
        ),
        (
            config.output_width == config.d_in,
            f"d_out = d_in = {config.d_in}, got {config.output_width}: it has one width",
        ),
        (
            config.transcodes or config.subtract_b_dec,
            "subtract_b_dec true unless it transcodes, got false: add W_enc b_dec to b_enc and set "
            "it first; the function stays",
        ),
    ):
        if not fits:
            raise ValueError(f"sparsify: expected {expected}")
    return {
        "expansion_factor": max(1, round(config.n_latents / config.d_in)),
        "multi_topk": False,
        **own,
        "activation": "topk",
        "normalize_decoder": config.unit_norm_decoder,
        "num_latents": config.n_latents,
        "k": config.k,
        "skip_connection": config.skip,
        "transcode": config.transcodes,
        "d_in": config.d_in,
    }
