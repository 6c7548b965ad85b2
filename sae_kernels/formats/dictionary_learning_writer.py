"""Writing dictionary_learning's folder: ``ae.pt``, a state dict, and ``config.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.config.places import RESID_POST, block_number, parts
from sae_kernels.formats.dictionary_learning import (
    CONFIG_FILE,
    KINDS,
    READ,
    WEIGHTS_FILE,
)
from sae_kernels.formats.layout import only_raw_activations, to_foreign
from sae_kernels.formats.origin import own_of, place_of, rest
from sae_kernels.formats.thresholds import check_not_negative, with_thresholds
from sae_kernels.io.files import json_writer, publish_all
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SwitchConfig,
    TopKConfig,
)
from sae_kernels.primitives.tensors import rounded_down

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sae_kernels.io.tensor_files import Tensors
    from sae_kernels.nn import SAEConfig

_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "SwitchAutoEncoder": "SwitchTrainer",
}
_NO_THRESHOLD = -1.0  # as dictionary_learning marks one that is not set


def write_dictionary_learning(
    folder: str | Path,
    config: SAEConfig,
    tensors: Tensors,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes an SAE as one of saprmarks/dictionary_learning's classes, complete or not at all.

    A Switch SAE is written for its fork, amudide/switch_sae; that class has no encoder bias, so the
    SAE's must be zeros. BatchTopK's threshold is rounded down to fp32, which leaves comparisons
    with fp32 values as they were.

    Args:
        folder: made when missing; its two files are replaced.
        config, tensors: the SAE, by our names, as `Weights` has them.
        metadata: the model and the layer (``"activations"``), what a file of the same class held
            (``"dictionary_learning"``), and the rest.

    Raises:
        ValueError, TypeError: an SAE that no class can hold; the message says why. Metadata that
            JSON lacks.
        DataError: tensors that are not what the configuration says.

    Example:
        >>> import tempfile
        >>> from sae_kernels.formats import read
        >>> config = SwitchConfig(2, 8, k=1, n_experts=4, encoder_bias=False)
        >>> tensors = {name: torch.zeros(size) for name, size in config.shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_dictionary_learning(folder, config, tensors)
        ...     read(folder).config == config
        True
    """
    only_raw_activations("dictionary_learning", config)
    name = _class(config)
    form = config
    if isinstance(config, JumpReLUConfig):
        form, tensors = with_thresholds("dictionary_learning", config, tensors)
    theirs = to_foreign("tensors", form, KINDS[name].names, tensors)
    if isinstance(config, JumpReLUConfig):
        check_not_negative("dictionary_learning", theirs["threshold"])
    if isinstance(config, SwitchConfig):
        _check_no_bias(tensors["b_enc"])
    if isinstance(config, BatchTopKConfig):
        theirs["threshold"] = rounded_down(theirs["threshold"].double())
    theirs |= _buffers(config)
    publish_all(
        folder,
        {
            WEIGHTS_FILE: lambda path: _save(theirs, path),
            CONFIG_FILE: json_writer(_settings(name, config, metadata)),
        },
    )


def _save(tensors: Tensors, path: Path) -> None:
    # Views of one storage would be written as such, and a name would become part of the file.
    with path.open("wb") as file:
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, file)


def _class(config: SAEConfig) -> str:
    """The name of the class that computes the same.

    Raises:
        ValueError: there is none.
    """
    subtracts = (config.subtract_b_dec, "subtract_b_dec true, got false: its class subtracts b_dec")
    raw = (not config.subtract_b_dec, "subtract_b_dec false, got true: its class does not subtract")
    ranks = getattr(config, "rank_by_decoder_norm", False)
    by_values = (
        not ranks,
        "rank_by_decoder_norm false, got true: multiply W_enc and b_enc by the norms of the "
        "decoder's rows and divide the rows by them first; codes grow by the norms",
    )
    needs = [(not config.transcodes, "an SAE, got a transcoder")]
    if isinstance(config, ReLUConfig):
        name = "AutoEncoder" if config.subtract_b_dec else "AutoEncoderNew"
    elif isinstance(config, TopKConfig):
        name = "AutoEncoderTopK"
        drops = "relu 'before' or 'after', got 'none': it drops negative values"
        needs += [subtracts, by_values, (config.relu != "none", drops)]
    elif isinstance(config, BatchTopKConfig):
        name = "BatchTopKSAE" if config.groups is None else "MatryoshkaBatchTopKSAE"
        whole = float(config.k).is_integer()
        needs += [subtracts, by_values, (whole, f"a whole k, got {config.k}")]
    elif isinstance(config, GatedConfig):
        name = "GatedAutoEncoder"
        needs += [subtracts]
    elif isinstance(config, JumpReLUConfig):
        name = "JumpReluAutoEncoder"
        needs += [raw]
    elif isinstance(config, SwitchConfig):
        name = "SwitchAutoEncoder"
        one = "shared_expert false, got true: SwitchAutoEncoder sends a token to one expert"
        needs += [subtracts, (not config.shared_expert, one)]
    else:
        raise ValueError(f"dictionary_learning: it has no class for {type(config).__name__}")
    for fits, expected in needs:
        if not fits:
            raise ValueError(f"dictionary_learning: expected {expected}")
    return name


def _check_no_bias(b_enc: torch.Tensor) -> None:
    if (largest := float(b_enc.abs().max())) > 0:
        raise ValueError(
            f"dictionary_learning: expected b_enc of zeros, got numbers up to {largest:.3g}: "
            "SwitchAutoEncoder has no encoder bias; train with encoder_bias false, or write the "
            "native format"
        )


def _buffers(config: SAEConfig) -> Tensors:
    """What these classes store beside their weights."""
    if isinstance(config, TopKConfig):
        k = torch.tensor(config.k, dtype=torch.int)
        return {"k": k, "threshold": torch.tensor(_NO_THRESHOLD)}
    if isinstance(config, BatchTopKConfig):
        groups = {} if config.groups is None else {"group_sizes": torch.tensor(config.groups)}
        return {"k": torch.tensor(int(config.k), dtype=torch.int), **groups}
    return {}


def _settings(name: str, config: SAEConfig, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    own, place = own_of(metadata, "dictionary_learning"), place_of(metadata)
    trainer = own_of(own, "trainer", READ)
    # Settings of another class's trainer say nothing here.
    trainer = trainer if trainer.get("dict_class") == name else {}
    values = {
        "trainer_class": _TRAINERS[name],
        **_place(place),
        **trainer,
        "dict_class": name,
        "activation_dim": config.d_in,
        "dict_size": config.n_latents,
    }
    if "model" in place:
        values["lm_name"] = place["model"]
    if isinstance(config, TopKConfig | BatchTopKConfig | SwitchConfig):
        values["k"] = int(config.k)
    if isinstance(config, BatchTopKConfig) and config.groups is not None:
        values["group_sizes"] = list(config.groups)
    if isinstance(config, SwitchConfig):
        values |= {"experts": config.n_experts, "heaviside": config.gate == "heaviside"}
    return {**own, "trainer": values, **rest(metadata, "dictionary_learning")}


def _place(place: Mapping[str, Any]) -> dict[str, Any]:
    """The layer's number and the submodule's name, as dictionary_learning's scripts give them."""
    hook, layer = parts(place.get("hook_name")), place.get("layer")
    number = block_number(place.get("hook_name"), layer)
    name = layer or place.get("hook_name")
    if hook is not None and hook[1] == RESID_POST:
        name = f"resid_post_layer_{hook[0]}"
    found = {"layer": number, "submodule_name": name}
    return {key: value for key, value in found.items() if value is not None}
