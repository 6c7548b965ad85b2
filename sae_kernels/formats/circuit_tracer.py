"""circuit-tracer's folders: ``config.yaml`` and a ``layer_N.safetensors`` for every layer.

As circuit_tracer 0.5.0 reads and writes them (utils/hf_utils.py, transcoder/
single_layer_transcoder.py). Matrices lie as here.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from sae_kernels.config.places import block_number, parts
from sae_kernels.errors import DataError
from sae_kernels.formats.layout import (
    Weights,
    configure,
    from_foreign,
    listed,
    load,
    only_raw_activations,
    to_foreign,
)
from sae_kernels.formats.origin import described, own_fields, own_of, place_of
from sae_kernels.formats.thresholds import with_thresholds
from sae_kernels.io.files import replacing
from sae_kernels.io.tensor_files import Stored, Tensors, stored_safetensors
from sae_kernels.io.yaml_files import read_yaml, yaml_text
from sae_kernels.nn import BatchTopKConfig, JumpReLUConfig, ReLUConfig, SAEConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CONFIG_FILE, LAYER_FILE = "config.yaml", "layer_{}.safetensors"
_LAYER = re.compile(r"layer_(\d{1,4})\.safetensors")
_KIND = "transcoder_set"
_READ = ("model_kind", "transcoders")  # the second: where files lie that are not these
_THRESHOLD = "activation_function.threshold"
_HOOKS = {"feature_input_hook": "--hook-name", "feature_output_hook": "--hook-name-out"}


def read_circuit_tracer(folder_or_file: str | Path) -> Weights:
    """Reads a transcoder of one layer: ReLU, or JumpReLU where the file has thresholds.

    Args:
        folder_or_file: a file such as ``layer_6.safetensors`` with config.yaml beside it, or the
            folder of a set of one layer.

    Raises:
        DataError: files missing or damaged, several layers, a cross-layer transcoder, tensors of
            other shapes than b_enc [F] and b_dec [D] say.

    Example:
        >>> import tempfile, torch
        >>> config = ReLUConfig(2, 3, d_out=2, subtract_b_dec=False)
        >>> tensors = {name: torch.zeros(size) for name, size in config.shapes().items()}
        >>> place = {"hook_name": "blocks.0.hook_resid_mid"}
        >>> place |= {"hook_name_out": "blocks.0.hook_mlp_out"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_circuit_tracer(folder, config, tensors, {"activations": place})
        ...     read_circuit_tracer(folder).metadata["activations"] == place
        True
    """
    path, values, stored, config = _open(Path(folder_or_file))
    names = _names(config)
    found = load(stored, config, names)
    tensors = from_foreign(stored.path, config, names, found)
    number = _LAYER.fullmatch(stored.path.name)
    hooks = {key: values.get(key) for key in _HOOKS}
    if number is not None:
        at = f"blocks.{int(number[1])}"
        hooks = {key: f"{at}.{hook}" for key, hook in hooks.items() if isinstance(hook, str)}
    metadata = described(
        "circuit_tracer",
        own_fields(path, values, _READ),
        model=values.get("model_name"),
        hook_name=hooks.get("feature_input_hook"),
        hook_name_out=hooks.get("feature_output_hook"),
    )
    return Weights(config, tensors, metadata)


def describe_circuit_tracer(folder_or_file: str | Path) -> SAEConfig:
    """What a transcoder is, by its tensors' names and shapes; no weights are read."""
    return _open(Path(folder_or_file))[-1]


def write_circuit_tracer(
    folder: str | Path,
    config: SAEConfig,
    tensors: Tensors,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a transcoder as a set of one layer; see `write_transcoder_set`."""
    write_transcoder_set(folder, [Weights(config, tensors, dict(metadata or {}))])


def write_transcoder_set(folder: str | Path, transcoders: Iterable[Weights]) -> None:
    """Writes transcoders of one model's layers as a set, complete or not at all.

    BatchTopK becomes JumpReLU with its threshold for every latent, as for SAELens. circuit-tracer
    itself runs a set only if it has every layer from 0 up.

    Args:
        folder: made when missing; files of these layers and config.yaml are replaced.
        transcoders: of one layer each, taken one after the other. Metadata must name the hooks
            (``"activations"``: hook_name and hook_name_out), whose blocks are the layers.

    Raises:
        ValueError: none; one that the format cannot hold; hooks that are missing or not the same in
            all layers; a layer twice. The message says what to do.
        DataError: tensors that are not what the configuration says.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {}
    layers: set[int] = set()
    with ExitStack() as stack:
        for weights in transcoders:
            layer, own = _place(weights.metadata)
            if layer in layers:
                raise ValueError(f"circuit_tracer: expected layers that differ, got {layer} twice")
            _check_same(settings, own, layer)
            settings = settings or own
            layers.add(layer)
            path = stack.enter_context(replacing(folder / LAYER_FILE.format(layer)))
            save_file(_theirs(weights.config, weights.tensors), path)
        if not layers:
            raise ValueError("circuit_tracer: expected at least one transcoder, got none")
        path = stack.enter_context(replacing(folder / CONFIG_FILE))
        path.write_text(yaml_text({"model_kind": _KIND, **settings}), encoding="utf-8")


def _open(path: Path) -> tuple[Path, dict[str, Any], Stored, SAEConfig]:
    folder = path if path.is_dir() else path.parent
    settings = folder / CONFIG_FILE
    values = read_yaml(settings)
    if (kind := values.get("model_kind", _KIND)) != _KIND:
        raise DataError(f"{settings}: expected model_kind {_KIND}, got {kind!r:.80}")
    if path.is_dir():
        files = sorted(
            f.name for f in path.glob(LAYER_FILE.format("*")) if _LAYER.fullmatch(f.name)
        )
        if len(files) != 1:
            raise DataError(
                f"{path}: expected the file of one layer, got {len(files)} of them; name one, as "
                f"{LAYER_FILE.format(6)}, with layer (convert: --layer)"
            )
        path = path / files[0]
    stored = stored_safetensors(path)
    sizes = stored.sizes
    for name in ("b_enc", "b_dec"):
        if len(sizes.get(name, ())) != 1:
            came = list(sizes[name]) if name in sizes else listed(sizes)
            raise DataError(f"{path}: expected a tensor {name} of one dimension, got {came!s:.300}")
    ((n_latents,), (d_in,)) = sizes["b_enc"], sizes["b_dec"]
    jumps = _THRESHOLD in sizes
    config = configure(
        path,
        JumpReLUConfig if jumps else ReLUConfig,
        d_in=d_in,
        n_latents=n_latents,
        d_out=d_in,
        skip="W_skip" in sizes,
        subtract_b_dec=False,
        unit_norm_decoder=False,
        **({"log_threshold": False} if jumps else {}),
    )
    return settings, values, stored, config


def _names(config: SAEConfig) -> dict[str, str]:
    return {name: _THRESHOLD if name == "threshold" else name for name in config.shapes()}


def _theirs(config: SAEConfig, tensors: Tensors) -> Tensors:
    """The tensors of a layer's file.

    Raises:
        ValueError: a function that the file cannot say.
    """
    only_raw_activations("circuit_tracer", config)
    for fits, expected in (
        (
            isinstance(config, ReLUConfig | JumpReLUConfig | BatchTopKConfig),
            f"a ReLU, JumpReLU or BatchTopK transcoder, got {type(config).__name__}",
        ),
        (
            config.output_width == config.d_in,
            f"d_out = d_in = {config.d_in}, got {config.output_width}: it has one width",
        ),
        (
            not config.subtract_b_dec,
            "subtract_b_dec false, got true: subtract W_enc b_dec from b_enc and set it first; the "
            "function stays",
        ),
    ):
        if not fits:
            raise ValueError(f"circuit_tracer: expected {expected}")
    config, tensors = with_thresholds("circuit_tracer", config, tensors)
    return to_foreign("tensors", config, _names(config), tensors)


def _place(metadata: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The layer, and the settings of its set."""
    own, place = own_of(metadata, "circuit_tracer", _READ), place_of(metadata)
    hooks = {}
    for key, flag in _HOOKS.items():
        said = place.get("hook_name" if key == "feature_input_hook" else "hook_name_out")
        found = parts(said)
        if found is None:
            raise ValueError(
                f"circuit_tracer: {key}: expected a hook as blocks.6.hook_resid_mid, got {said!r}; "
                f"name it with {flag}"
            )
        hooks[key] = found[1]
    layer = block_number(place["hook_name"])
    assert layer is not None
    model = {"model_name": place["model"]} if "model" in place else {}
    return layer, {**own, **model, **hooks}


def _check_same(first: Mapping[str, Any], other: Mapping[str, Any], layer: int) -> None:
    for key in ("model_name", *_HOOKS):
        if first and first.get(key) != other.get(key):
            raise ValueError(
                f"circuit_tracer: {key}: expected {first.get(key)!r}, as in the layers before, got "
                f"{other.get(key)!r} in layer {layer}"
            )
