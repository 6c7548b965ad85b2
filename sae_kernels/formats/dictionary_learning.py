"""dictionary_learning's folders: ``ae.pt``, a state dict, and ``config.json``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.errors import DataError
from sae_kernels.formats.layout import Weights, at_least_zero, configure, from_foreign, load
from sae_kernels.io.state_dicts import stored_state_dict
from sae_kernels.io.tensor_files import Tensors, flag, read_settings, whole
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    SwitchConfig,
    TopKConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"

_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
_PLAIN = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {
    "b_enc": "gate_bias",
    "b_mag": "mag_bias",
    "r_mag": "r_mag",
    "b_dec": "decoder_bias",
}
_THRESHOLD = {"threshold": "threshold"}
SWITCH = {
    "W_enc": "encoder.weight",
    "b_enc": "",
    "W_dec": "decoder",
    "b_dec": "b_dec",
    "W_router": "router.weight",
    "b_router": "b_router",
}


class _Kind(NamedTuple):
    """One of dictionary_learning's classes: ours, its names for our tensors, and its buffers."""

    make: Callable[..., SAEConfig]
    names: dict[str, str]
    buffers: tuple[str, ...] = ()
    subtract_b_dec: bool = True
    unit_norm_decoder: bool = True


_KINDS = {
    "AutoEncoder": _Kind(ReLUConfig, _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Kind(
        ReLUConfig,
        _LINEAR | {"b_dec": "decoder.bias"},
        subtract_b_dec=False,
        unit_norm_decoder=False,
    ),
    "AutoEncoderTopK": _Kind(TopKConfig, _LINEAR | {"b_dec": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": _Kind(BatchTopKConfig, _LINEAR | {"b_dec": "b_dec"} | _THRESHOLD, ("k",)),
    "MatryoshkaBatchTopKSAE": _Kind(BatchTopKConfig, _PLAIN | _THRESHOLD, ("k", "group_sizes")),
    "GatedAutoEncoder": _Kind(GatedConfig, _LINEAR | _GATED),
    "JumpReluAutoEncoder": _Kind(JumpReLUConfig, _PLAIN | _THRESHOLD, subtract_b_dec=False),
    "SwitchAutoEncoder": _Kind(SwitchConfig, SWITCH),
}
METADATA = {"lm_name": "model_name", "layer": "layer", "submodule_name": "submodule_name"}


def read_dictionary_learning(folder_or_file: str | Path) -> Weights:
    """Reads a dictionary of saprmarks/dictionary_learning; its pickle may hold tensors only.

    ``trainer.dict_class`` of config.json says which class. b_dec is subtracted from the input, but
    not by JumpReluAutoEncoder and AutoEncoderNew. Codes are the file's: its own loader may still
    normalise the decoder of an AutoEncoder, which multiplies codes by the norms. A negative
    JumpReLU threshold becomes 0 (the class's ReLU says so). AutoEncoderTopK keeps k latents of a
    token, whatever threshold lies beside them. SwitchAutoEncoder is amudide/switch_sae's, a fork's.

    Args:
        folder_or_file: ``trainer_0``, or a file such as ``trainer_0/checkpoints/ae_1000.pt``.

    Raises:
        DataError: files missing or damaged, a pickle with more than tensors, a class that is not
            here, tensors that are not what config.json says.

    Example:
        >>> import json, pathlib, tempfile, torch
        >>> trainer = {"dict_class": "AutoEncoder", "activation_dim": 2, "dict_size": 3}
        >>> tensors = {"bias": torch.zeros(2), "encoder.bias": torch.zeros(3)}
        >>> tensors |= {"encoder.weight": torch.ones(3, 2), "decoder.weight": torch.ones(2, 3)}
        >>> with tempfile.TemporaryDirectory() as name:
        ...     torch.save(tensors, pathlib.Path(name, "ae.pt"))
        ...     _ = pathlib.Path(name, "config.json").write_text(json.dumps({"trainer": trainer}))
        ...     read_dictionary_learning(name).tensors["W_dec"].shape
        torch.Size([3, 2])
    """
    file = Path(folder_or_file)
    file = file / WEIGHTS_FILE if file.is_dir() else file
    path, trainer = _trainer(file)
    name = trainer.get("dict_class")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise DataError(
            f"{path}: dict_class: expected one of {', '.join(_KINDS)}, got {name!r:.80}"
        )
    stored = stored_state_dict(file)
    claimed = _claimed(path, kind, trainer, "k" in stored.sizes)
    others = {name: claimed.n_latents if name == "group_sizes" else 1 for name in kind.buffers}
    found = load(stored, claimed, kind.names, others)
    buffers = {name: _integers(file, name, found) for name in kind.buffers if name != "threshold"}
    if "threshold" in kind.buffers:
        found.pop("threshold", None)
    config = configure(path, dataclasses.replace, claimed, **_options(file, trainer, buffers))
    tensors = from_foreign(file, config, kind.names, found)
    if kind.make is JumpReLUConfig:
        tensors["threshold"] = at_least_zero(tensors["threshold"])
    if kind.make is SwitchConfig:  # whose trainer gives both biases one memory
        tensors["b_router"] = tensors["b_router"].clone()
    metadata = {ours: trainer[key] for key, ours in METADATA.items() if key in trainer}
    return Weights(config, tensors, metadata)


def _trainer(file: Path) -> tuple[Path, dict[str, Any]]:
    """Trainer settings of the config.json beside a file, or above its folder of checkpoints."""
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    path = folder / CONFIG_FILE
    trainer = read_settings(path).get("trainer")
    if not isinstance(trainer, dict):
        raise DataError(f"{path}: trainer: expected an object, got {type(trainer).__name__}")
    return path, trainer


def _claimed(path: Path, kind: _Kind, trainer: dict[str, Any], k_is_stored: bool) -> SAEConfig:
    """The configuration but for what the buffers hold: it says how large the tensors are."""
    options: dict[str, Any] = {}
    if "k" in kind.buffers:
        options["k"] = 1 if k_is_stored else trainer.get("k")
    if kind.make is TopKConfig:
        options["relu"] = "before"
    if kind.make is JumpReLUConfig:
        options["log_threshold"] = False
    if kind.make is SwitchConfig:
        options |= {"k": whole(path, trainer, "k"), "n_experts": whole(path, trainer, "experts")}
        options["encoder_bias"] = False
        options["gate"] = "heaviside" if flag(path, trainer, "heaviside", False) else "softmax"
    return configure(
        path,
        kind.make,
        d_in=whole(path, trainer, "activation_dim"),
        n_latents=whole(path, trainer, "dict_size"),
        subtract_b_dec=kind.subtract_b_dec,
        unit_norm_decoder=kind.unit_norm_decoder,
        **options,
    )


def _options(file: Path, trainer: dict[str, Any], buffers: dict[str, Any]) -> dict[str, Any]:
    """Settings that the file's buffers add to the configuration."""
    options: dict[str, Any] = {}
    if (stored := buffers.get("k")) is not None:
        said = trainer.get("k")
        if said is not None and stored != said:
            raise DataError(f"{file}: k: expected {said!r:.40} as {CONFIG_FILE} says, got {stored}")
        options["k"] = stored
    if "group_sizes" in buffers:
        options["groups"] = buffers["group_sizes"]
    return options


def _integers(file: Path, name: str, found: Tensors) -> Any:
    """A buffer's value or list of values; None where an older version stored none."""
    buffer = found.pop(name, None)
    if buffer is None:
        return None
    if buffer.is_floating_point() or buffer.is_complex() or buffer.ndim > 1:
        raise DataError(f"{file}: {name}: expected integers, got {buffer.dtype}")
    return buffer.tolist()
