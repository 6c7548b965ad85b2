"""dictionary_learning's folders: ``ae.pt``, a state dict, and ``config.json``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from sae_kernels.io.state_dicts import stored_state_dict
from sae_kernels.io.tensor_files import Sizes, Stored, Tensors, flag, read_settings, whole
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
_SWITCH = {
    "W_enc": "encoder.weight",
    "b_enc": "",
    "W_dec": "decoder",
    "b_dec": "b_dec",
    "W_router": "router.weight",
    "b_router": "b_router",
}


class Kind(NamedTuple):
    """One of dictionary_learning's classes: ours, its names for our tensors, and its buffers."""

    make: Callable[..., SAEConfig]
    names: dict[str, str]
    buffers: tuple[str, ...] = ()
    subtract_b_dec: bool = True
    unit_norm_decoder: bool = True

    def fits(self, sizes: Sizes) -> bool:
        """Whether a file holds the tensors of this class; only JumpReLU has a row of thresholds."""
        own = {name.removesuffix(".T") for name in self.names.values() if name}
        row = len(sizes.get("threshold", ())) == 1
        return own <= {*sizes} <= own | {*self.buffers} and row == (self.make is JumpReLUConfig)


KINDS = {
    "AutoEncoder": Kind(ReLUConfig, _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": Kind(
        ReLUConfig,
        _LINEAR | {"b_dec": "decoder.bias"},
        subtract_b_dec=False,
        unit_norm_decoder=False,
    ),
    "AutoEncoderTopK": Kind(TopKConfig, _LINEAR | {"b_dec": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": Kind(BatchTopKConfig, _LINEAR | {"b_dec": "b_dec"} | _THRESHOLD, ("k",)),
    "MatryoshkaBatchTopKSAE": Kind(BatchTopKConfig, _PLAIN | _THRESHOLD, ("k", "group_sizes")),
    "GatedAutoEncoder": Kind(GatedConfig, _LINEAR | _GATED),
    "JumpReluAutoEncoder": Kind(JumpReLUConfig, _PLAIN | _THRESHOLD, subtract_b_dec=False),
    "SwitchAutoEncoder": Kind(SwitchConfig, _SWITCH),
}
# Of the trainer's settings; k stays, as one that is still falling differs from the file's.
READ = ("activation_dim", "dict_size", "experts", "heaviside")
# What dictionary_learning's scripts call the output of block N, as SAELens' loader reads it.
RESID_POST = re.compile(r"resid_post_layer_(\d{1,4})")


def read_dictionary_learning(folder_or_file: str | Path) -> Weights:
    """Reads a dictionary of saprmarks/dictionary_learning; its pickle may hold tensors only.

    ``trainer.dict_class`` of config.json says which class. Without it the names of the tensors do,
    but for AutoEncoderTopK and BatchTopKSAE, which have the same. k is the file's, which during
    k's annealing is not yet that of config.json. b_dec is subtracted from the input, but not by
    JumpReluAutoEncoder and AutoEncoderNew. Codes are the file's: its own loader may still normalise
    the decoder of an AutoEncoder, which multiplies codes by the norms. A negative JumpReLU
    threshold becomes 0 (the class's ReLU says so). AutoEncoderTopK keeps k latents of a token,
    whatever threshold lies beside them. SwitchAutoEncoder is amudide/switch_sae's, a fork's.

    Args:
        folder_or_file: ``trainer_0``, or a file such as ``trainer_0/checkpoints/ae_1000.pt``.

    Raises:
        DataError: files missing or damaged, a pickle with more than tensors, a class that is not
            here, tensors that are not what config.json says.

    Example:
        >>> import pathlib, tempfile, torch
        >>> tensors = {"bias": torch.zeros(2), "encoder.bias": torch.zeros(3)}
        >>> tensors |= {"encoder.weight": torch.ones(3, 2), "decoder.weight": torch.ones(2, 3)}
        >>> with tempfile.TemporaryDirectory() as name:
        ...     torch.save(tensors, pathlib.Path(name, "ae.pt"))
        ...     read_dictionary_learning(name).config.architecture
        'relu'
    """
    path, values, stored, kind, claimed = _open(Path(folder_or_file))
    file = stored.path
    others = {name: claimed.n_latents if name == "group_sizes" else 1 for name in kind.buffers}
    found = load(stored, claimed, kind.names, others)
    buffers = {name: _integers(file, name, found) for name in kind.buffers if name != "threshold"}
    if "threshold" in kind.buffers:
        found.pop("threshold", None)
    given = {"k": buffers.get("k"), "groups": buffers.get("group_sizes")}
    given = {name: value for name, value in given.items() if value is not None}
    config = configure(path, dataclasses.replace, claimed, **given)
    tensors = from_foreign(file, config, kind.names, found)
    if kind.make is JumpReLUConfig:
        tensors["threshold"] = at_least_zero(tensors["threshold"])
    if kind.make is SwitchConfig:  # whose trainer gives both biases one memory
        tensors["b_router"] = tensors["b_router"].clone()
    return Weights(config, tensors, _metadata(path, values))


def describe_dictionary_learning(folder_or_file: str | Path) -> SAEConfig:
    """What a dictionary is, by its settings and its tensors' names; no weights are read.

    k is that of config.json, and 1 where there is none.
    """
    opened = _open(Path(folder_or_file))
    said = opened.values["trainer"].get("k")
    if "k" not in opened.kind.buffers or said is None:
        return opened.claimed
    return configure(opened.path, dataclasses.replace, opened.claimed, k=said)


class _Opened(NamedTuple):
    """A dictionary of which only the settings and the tensors' names are read."""

    path: Path
    values: dict[str, Any]
    stored: Stored
    kind: Kind
    claimed: SAEConfig


def _open(file: Path) -> _Opened:
    file = file / WEIGHTS_FILE if file.is_dir() else file
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    path = folder / CONFIG_FILE
    values = read_settings(path) if path.exists() or path.is_symlink() else {"trainer": {}}
    trainer = values.get("trainer")
    if not isinstance(trainer, dict):
        raise DataError(f"{path}: trainer: expected an object, got {type(trainer).__name__}")
    stored = stored_state_dict(file)
    kind = _kind(path, trainer.get("dict_class"), stored)
    return _Opened(path, values, stored, kind, _claimed(path, kind, trainer, stored.sizes))


def _kind(path: Path, name: object, stored: Stored) -> Kind:
    """The class that config.json names, or whose tensors these are."""
    if name is not None:
        kind = KINDS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise DataError(
                f"{path}: dictionary_learning's class {name!r:.80}, which sae_kernels does not "
                f"have (it has {', '.join(KINDS)})"
            )
        return kind
    fitting = [name for name, kind in KINDS.items() if kind.fits(stored.sizes)]
    if len(fitting) == 1:
        return KINDS[fitting[0]]
    what = f"{' and '.join(fitting)} both have" if fitting else "no known class has"
    raise DataError(
        f"{stored.path}: expected {path} to say which class it is; {what} the tensors "
        f'{listed(stored.sizes)}. Write there {{"trainer": {{"dict_class": "BatchTopKSAE"}}}}'
    )


def _metadata(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    trainer = values["trainer"]
    own = own_fields(path, values, ("trainer",))
    if kept := own_fields(path, trainer, READ):
        own["trainer"] = kept
    label = RESID_POST.fullmatch(str(trainer.get("submodule_name")))
    return described(
        "dictionary_learning",
        own,
        model=trainer.get("lm_name"),
        hook_name=f"blocks.{int(label[1])}.hook_resid_post" if label else None,
    )


def _claimed(path: Path, kind: Kind, trainer: dict[str, Any], sizes: Sizes) -> SAEConfig:
    """The configuration but for what the buffers hold: it says how large the tensors are."""
    options: dict[str, Any] = {}
    if "k" in kind.buffers:
        options["k"] = 1 if "k" in sizes else trainer.get("k")
    if kind.make is TopKConfig:
        options["relu"] = "before"
    if kind.make is JumpReLUConfig:
        options["log_threshold"] = False
    if kind.make is SwitchConfig:
        options |= {"k": whole(path, trainer, "k"), "n_experts": whole(path, trainer, "experts")}
        options["encoder_bias"] = False
        options["gate"] = "heaviside" if flag(path, trainer, "heaviside", False) else "softmax"
    n_latents, d_in = _widths(kind, sizes)
    return configure(
        path,
        kind.make,
        d_in=whole(path, trainer, "activation_dim", d_in),
        n_latents=whole(path, trainer, "dict_size", n_latents),
        subtract_b_dec=kind.subtract_b_dec,
        unit_norm_decoder=kind.unit_norm_decoder,
        **options,
    )


def _widths(kind: Kind, sizes: Sizes) -> tuple[int | None, int | None]:
    """F and D by the encoder's shape, where a file has one of two dimensions."""
    name = kind.names["W_enc"]
    size = sizes.get(name.removesuffix(".T"), ())
    if len(size) != 2:
        return None, None
    return size[::-1] if name.endswith(".T") else size


def _integers(file: Path, name: str, found: Tensors) -> Any:
    """A buffer's value or list of values; None where an older version stored none."""
    buffer = found.pop(name, None)
    if buffer is None:
        return None
    if buffer.is_floating_point() or buffer.is_complex() or buffer.ndim > 1:
        raise DataError(f"{file}: {name}: expected integers, got {buffer.dtype}")
    return buffer.tolist()
