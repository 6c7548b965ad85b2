"""Google's Gemma Scope: ``params.npz``, and Gemma Scope 2's ``params.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import DataError
from sae_kernels.formats.layout import (
    Weights,
    at_least_zero,
    configure,
    from_foreign,
    listed,
    load,
)
from sae_kernels.formats.origin import described, own_fields
from sae_kernels.io.arrays import stored_npz
from sae_kernels.io.tensor_files import Sizes, Stored, Tensors, read_settings, stored_safetensors
from sae_kernels.nn import JumpReLUConfig

if TYPE_CHECKING:
    from sae_kernels.nn import SAEConfig

FILES = ("params.npz", "params.safetensors")
CONFIG_FILE = "config.json"
_READ = ("architecture",)


def read_gemma_scope(folder_or_file: str | Path) -> Weights:
    """Reads a JumpReLU SAE or transcoder of Gemma Scope, in either version's layout.

    b_dec is not subtracted from the input. The first version's files do not tell a transcoder from
    an SAE where both widths are equal; as a function they are the same. Its embedding SAEs read
    embeddings before Gemma multiplies them by sqrt(D). The second version's affine skip connection
    lies transposed.

    Args:
        folder_or_file: params.npz or params.safetensors, or the folder of one. Beside the second, a
            config.json says where the SAE belongs.

    Raises:
        DataError: a file missing or damaged, arrays of objects, tensors missing or of other shapes
            than the rest.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> params = {"W_enc": np.ones((2, 3), "f4"), "W_dec": np.ones((3, 2), "f4")}
        >>> params |= {"b_enc": np.zeros(3, "f4"), "b_dec": np.zeros(2, "f4")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(pathlib.Path(folder, "params.npz"), threshold=np.ones(3, "f4"), **params)
        ...     read_gemma_scope(folder).tensors["W_enc"].shape
        torch.Size([3, 2])
    """
    stored, values, config = _open(Path(folder_or_file))
    file, w = stored.path, _letter(stored.sizes)
    theirs = {"W_enc": f"{w}_enc.T", "W_dec": f"{w}_dec", "W_skip": "affine_skip_connection.T"}
    names = {name: theirs.get(name, name) for name in config.shapes()}
    found = load(stored, config, names, {"scaling_factor": config.n_latents})
    _drop_ones(file, found)
    tensors = from_foreign(file, config, names, found)
    tensors["threshold"] = at_least_zero(tensors["threshold"])
    source, target = values.get("hf_hook_point_in"), values.get("hf_hook_point_out")
    metadata = described(
        "gemma_scope",
        own_fields(file.with_name(CONFIG_FILE), values, _READ),
        model=values.get("model_name"),
        layer=source,
        target_layer=None if target == source else target,
    )
    return Weights(config, tensors, metadata)


def describe_gemma_scope(folder_or_file: str | Path) -> SAEConfig:
    """What an SAE is, by its settings and the shapes of its arrays; no weights are read."""
    return _open(Path(folder_or_file))[-1]


def _open(path: Path) -> tuple[Stored, dict[str, Any], SAEConfig]:
    file = _file(path)
    stored = stored_npz(file) if file.suffix == ".npz" else stored_safetensors(file)
    values = _values(file.with_name(CONFIG_FILE)) if file.suffix == ".safetensors" else {}
    return stored, values, _config(file, values, stored.sizes, _letter(stored.sizes))


def _letter(sizes: Sizes) -> str:
    return "w" if "w_enc" in sizes else "W"


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    here = [path / name for name in FILES if (path / name).is_file()]
    if len(here) != 1:
        raise DataError(
            f"{path}: expected one of {' and '.join(FILES)} in it, got "
            f"{'both; name the file' if here else 'neither'}"
        )
    return here[0]


def _values(path: Path) -> dict[str, Any]:
    """Values of config.json, which some of the repositories do not have."""
    values = read_settings(path) if path.is_file() else {}
    if (architecture := values.get("architecture", "jump_relu")) != "jump_relu":
        raise DataError(
            f"{path}: architecture: expected 'jump_relu', got {architecture!r:.80}; no other is "
            "known in this format"
        )
    return values


def _drop_ones(file: Path, found: Tensors) -> None:
    factor = found.pop("scaling_factor", None)
    if factor is not None and not (factor == 1).all():
        raise DataError(
            f"{file}: scaling_factor: expected ones, got others; what they multiply is not known"
        )


def _config(file: Path, values: dict[str, Any], sizes: Sizes, w: str) -> SAEConfig:
    widths = []
    for name, size in ((f"{w}_enc", "[d_in, n_latents]"), (f"{w}_dec", "[n_latents, d_out]")):
        if len(sizes.get(name, ())) != 2:
            came = list(sizes[name]) if name in sizes else listed(sizes)
            raise DataError(f"{file}: expected a tensor {name} {size}, got {came!s:.300}")
        widths.append(sizes[name])
    (d_in, n_latents), (_, d_out) = widths
    skip = "affine_skip_connection" in sizes
    source, target = values.get("hf_hook_point_in"), values.get("hf_hook_point_out")
    transcodes = skip or d_out != d_in or target not in (None, source)
    return configure(
        file,
        JumpReLUConfig,
        d_in=d_in,
        n_latents=n_latents,
        d_out=d_out if transcodes else None,
        skip=skip,
        subtract_b_dec=False,
        log_threshold=False,
    )
