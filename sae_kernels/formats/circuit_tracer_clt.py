"""circuit-tracer's cross-layer transcoders: ``config.yaml``, a file of W_enc and of W_dec a layer.

As circuit_tracer 0.5.0 reads and writes them (transcoder/cross_layer_transcoder.py): W_dec_i
[F, L - i, D] has the rows of layer i's latents at layer i and all after it.
"""

from __future__ import annotations

import itertools
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file

from sae_kernels.config.places import parts
from sae_kernels.errors import DataError
from sae_kernels.formats.circuit_tracer import CONFIG_FILE
from sae_kernels.formats.layout import Weights, check, check_dtype, check_sizes, configure
from sae_kernels.formats.origin import described, own_fields, own_of, place_of
from sae_kernels.io.files import replacing
from sae_kernels.io.tensor_files import Stored, Tensors, stored_safetensors
from sae_kernels.io.yaml_files import read_yaml, yaml_text
from sae_kernels.nn import (
    CrossLayerBatchTopK,
    CrossLayerConfig,
    CrossLayerJumpReLUConfig,
    SAEConfig,
    from_weights,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.io.tensor_files import Sizes

ENCODER_FILE, DECODER_FILE = "W_enc_{}.safetensors", "W_dec_{}.safetensors"
_LAYER = re.compile(r"W_(?:enc|dec)_(\d{1,4})\.safetensors")
_KIND = "cross_layer_transcoder"
_READ = ("model_kind", "transcoders")
_HOOKS = {"feature_input_hook": "hook_name", "feature_output_hook": "hook_name_out"}


def read_cross_layer(folder_or_file: str | Path, *, decoders: bool = True) -> Weights:
    """Reads a cross-layer transcoder, one file after the other.

    Without thresholds in the files, which means ReLU, they are 0: the same codes.

    Args:
        folder_or_file: the folder, or any of its files.
        decoders: whether to read W_dec too.

    Raises:
        DataError: a layer's file that is missing or damaged, tensors of other shapes than those of
            the first layer, numbers that are not finite, files of several dtypes.

    Example:
        >>> import tempfile, torch
        >>> from sae_kernels.nn import CrossLayerJumpReLU
        >>> clt = CrossLayerJumpReLU(2, 6, n_layers=2, d_out=2, log_threshold=False)
        >>> hooks = {"hook_name": "hook_resid_mid", "hook_name_out": "hook_mlp_out"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_cross_layer(folder, clt.config, clt.state_dict(), {"activations": hooks})
        ...     again = read_cross_layer(folder)
        >>> torch.equal(again.tensors["W_dec"], clt.W_dec)
        True
    """
    found = _open(Path(folder_or_file))
    config = found.config
    each, starts = config.layer_latents, _starts(config)
    tensors: Tensors = {}

    def put(name: str, rows: slice, part: torch.Tensor) -> None:
        if name not in tensors:
            tensors[name] = torch.empty(config.shapes()[name], dtype=part.dtype)
        if part.dtype != tensors[name].dtype:
            raise DataError(
                f"{found.settings.parent}: expected one dtype, got {tensors[name].dtype} and "
                f"{part.dtype} in {name}"
            )
        tensors[name][rows] = part

    for i, files in enumerate(found.layers):
        own, width = slice(i * each, (i + 1) * each), config.d_in
        wanted = zip(files, _sizes(config, i, found.jumps), strict=True)
        for stored, sizes in itertools.islice(wanted, 1 + decoders):
            loaded = stored.load()
            check(stored.path, sizes, loaded)
            for name, tensor in loaded.items():
                ours = name.rpartition("_")[0]
                if ours == "W_dec":
                    for start, part in zip(starts[i:], tensor.unbind(1), strict=True):
                        put(ours, slice(start + own.start, start + own.stop), part)
                elif ours == "b_dec":
                    put(ours, slice(i * width, (i + 1) * width), tensor)
                else:
                    put(ours, own, tensor.float() if ours == "threshold" else tensor)
    tensors.setdefault("threshold", torch.zeros(config.n_latents))
    values = found.values
    metadata = described(
        "circuit_tracer_clt",
        own_fields(found.settings, values, _READ),
        model=values.get("model_name"),
        **{ours: values.get(theirs) for theirs, ours in _HOOKS.items()},
    )
    return Weights(config, tensors, metadata)


def stored_decoders(folder_or_file: str | Path) -> list[torch.Tensor]:
    """W_dec of each layer as it lies in its file, mapped into memory: what is used is read.

    Raises:
        DataError: as `read_cross_layer`, but for numbers that are not finite.
    """
    found = []
    for _, decoder in _open(Path(folder_or_file)).layers:
        for name, rows in decoder.load().items():
            check_dtype(decoder.path, name, rows)
            found.append(rows)
    return found


def describe_cross_layer(folder_or_file: str | Path) -> SAEConfig:
    """What a cross-layer transcoder is, by its tensors' names and shapes; no weights are read."""
    return _open(Path(folder_or_file)).config


def write_cross_layer(
    folder: str | Path,
    config: SAEConfig,
    tensors: Tensors,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a cross-layer transcoder, complete or not at all.

    BatchTopK becomes JumpReLU with the threshold of every latent, as for SAELens.

    Args:
        folder: made when missing; files of these layers and config.yaml are replaced.
        config, tensors: of a weakly causal JumpReLU or BatchTopK transcoder whose layers are read
            and written in the same width.
        metadata: must name the hooks (``"activations"``: hook_name and hook_name_out); the block in
            them does not count.

    Raises:
        ValueError: what the format cannot hold, or hooks that are missing.
        DataError: tensors that are not what the configuration says.
    """
    settings = _settings(metadata or {})
    config, tensors = to_cross_layer(config, tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    each, starts = config.layer_latents, _starts(config)
    by_layer = {n: tensors[n].unflatten(0, (config.n_layers, -1)) for n in tensors if n != "W_dec"}
    with ExitStack() as stack:
        for i in range(config.n_layers):
            own = {f"{n}_{i}": rows[i].contiguous() for n, rows in by_layer.items()}
            save_file(own, stack.enter_context(replacing(folder / ENCODER_FILE.format(i))))
            latents = range(i * each, (i + 1) * each)
            rows = [tensors["W_dec"][s + latents.start : s + latents.stop] for s in starts[i:]]
            path = stack.enter_context(replacing(folder / DECODER_FILE.format(i)))
            save_file({f"W_dec_{i}": torch.stack(rows, 1)}, path)
        path = stack.enter_context(replacing(folder / CONFIG_FILE))
        path.write_text(yaml_text({"model_kind": _KIND, **settings}), encoding="utf-8")


class _Opened(NamedTuple):
    """A folder whose headers were read.

    Attributes:
        settings: the path of config.yaml.
        values: what is in it.
        layers: the files of each layer, of W_enc and of W_dec.
        jumps: whether there are thresholds.
        config: what it is.
    """

    settings: Path
    values: dict[str, Any]
    layers: list[tuple[Stored, Stored]]
    jumps: bool
    config: CrossLayerJumpReLUConfig


def _open(path: Path) -> _Opened:
    folder = path if path.is_dir() else path.parent
    settings = folder / CONFIG_FILE
    values = read_yaml(settings)
    if (kind := values.get("model_kind", _KIND)) != _KIND:
        raise DataError(f"{settings}: expected model_kind {_KIND}, got {kind!r:.80}")
    matched = (_LAYER.fullmatch(file.name) for file in folder.glob("W_*.safetensors"))
    numbers = {int(match[1]) for match in matched if match is not None}
    if not numbers:
        raise DataError(f"{folder}: expected {ENCODER_FILE.format(0)}, it is not there")
    last = max(numbers)
    layers = []
    for i in range(last + 1):
        paths = [folder / name.format(i) for name in (ENCODER_FILE, DECODER_FILE)]
        for file in paths:
            if not file.is_file():
                raise DataError(
                    f"{folder}: expected {file.name}, as of every layer from 0 to {last}; it is "
                    "not there"
                )
        layers.append((stored_safetensors(paths[0]), stored_safetensors(paths[1])))
    config, jumps = _config(layers), "threshold_0" in layers[0][0].sizes
    for i, files in enumerate(layers):
        for stored, sizes in zip(files, _sizes(config, i, jumps), strict=True):
            check_sizes(stored.path, sizes, stored.sizes)
    return _Opened(settings, values, layers, jumps, config)


def _config(layers: list[tuple[Stored, Stored]]) -> CrossLayerJumpReLUConfig:
    """By the first layer's shapes; the others are compared with it later."""
    path, sizes, _ = layers[0][0]
    size = sizes.get("W_enc_0", ())
    if len(size) != 2 or not all(size):
        raise DataError(f"{path}: expected a tensor W_enc_0 [F, D], got {list(size)}")
    rows = layers[0][1].sizes.get("W_dec_0", ())
    if len(rows) == 3 and rows[1] != len(layers):
        raise DataError(
            f"{layers[0][1].path}: expected the files of {rows[1]} layers, as W_dec_0 "
            f"{list(rows)} says, got those of {len(layers)}"
        )
    config = configure(
        path,
        CrossLayerJumpReLUConfig,
        size[1],
        size[0] * len(layers),
        n_layers=len(layers),
        d_out=size[1],
        log_threshold=False,
    )
    assert isinstance(config, CrossLayerJumpReLUConfig)
    return config


def _starts(config: CrossLayerConfig) -> list[int]:
    """Where the rows of W_dec of each layer's decoder begin."""
    return [sum(config.writers[:layer]) for layer in range(config.n_layers)]


def _sizes(config: CrossLayerConfig, layer: int, jumps: bool) -> tuple[Sizes, Sizes]:
    """Shapes of the tensors in a layer's two files."""
    F, D = config.layer_latents, config.d_in
    sizes = {
        "W_enc": (F, D),
        "b_enc": (F,),
        "b_dec": (D,),
        **({"threshold": (F,)} if jumps else {}),
    }
    encoder: Sizes = {f"{name}_{layer}": size for name, size in sizes.items()}
    return encoder, {f"W_dec_{layer}": (F, config.n_layers - layer, D)}


def to_cross_layer(config: SAEConfig, tensors: Tensors) -> tuple[CrossLayerConfig, Tensors]:
    """What the files can hold: W_enc, b_enc, W_dec, b_dec and a threshold for every latent.

    Raises:
        ValueError: a function that the files cannot say.
    """
    if not isinstance(config, CrossLayerConfig):
        raise ValueError(
            f"circuit_tracer_clt: expected a cross-layer transcoder, got a {type(config).__name__}"
        )
    for name, expected in (("causality", "weak"), ("activation_scale", 1), ("target_scale", 1)):
        if (came := getattr(config, name)) != expected:
            raise ValueError(f"circuit_tracer_clt: expected {name} {expected}, got {came}")
    if not config.transcodes or config.d_out != config.d_in:
        raise ValueError(
            f"circuit_tracer_clt: expected d_out = d_in = {config.d_in}, got {config.d_out}: it "
            "has one width, and another activation to write than to read"
        )
    check("tensors", config.shapes(), tensors)
    sae = from_weights(config, dict(tensors))
    if isinstance(sae, CrossLayerBatchTopK):
        bounds = sae.bounds()
        assert bounds is not None  # not in training mode
        thresholds = bounds.expand(config.n_latents)
    elif isinstance(config, CrossLayerJumpReLUConfig):
        thresholds = sae.thresholds().detach()  # type: ignore[operator]
    else:
        raise ValueError(
            "circuit_tracer_clt: expected JumpReLU or BatchTopK, got "
            f"{type(config).__name__}: it has no other selection"
        )
    kept = {name: tensors[name].detach().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return config, {**kept, "threshold": thresholds.float().cpu()}


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.yaml: the tool's own, the model and the hooks."""
    own, place = own_of(metadata, "circuit_tracer_clt", _READ), place_of(metadata)
    hooks = {}
    for theirs, ours in _HOOKS.items():
        said = place.get(ours)
        found = parts(said)
        hook = said if found is None else found[1]
        if not isinstance(hook, str) or not hook:
            flag = f"--{ours.replace('_', '-')}"
            raise ValueError(
                f"circuit_tracer_clt: {theirs}: expected a hook as hook_resid_mid, got {said!r}; "
                f"name it with {flag}"
            )
        hooks[theirs] = hook
    return {**own, **({"model_name": place["model"]} if "model" in place else {}), **hooks}
