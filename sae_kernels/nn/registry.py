"""Registry of architectures and presets by name, open to classes from outside the package.

A class registered by :func:`register`, or named in the entry point group
``sae_kernels.architectures`` of an installed package, is trained, saved, loaded and evaluated like
one of this package's own.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch

from sae_kernels.errors import name_hint

if TYPE_CHECKING:
    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.nn.base import SparseAutoencoder

    _Class = TypeVar("_Class", bound=type[SparseAutoencoder])

# Settings that several presets share.
FREE_NORMS = {"unit_norm_decoder": False}
TRANSCODES = {"subtract_b_dec": False, **FREE_NORMS}

ENTRY_POINTS = "sae_kernels.architectures"
_CLASSES: dict[str, type[SparseAutoencoder]] = {}


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named variant of an architecture, for ``--arch``.

    Attributes:
        about: one line of help.
        sae, objective, optimizer: settings that differ from the defaults of their class.
        data: the activations it trains on: one "layer", a layer and another one as its "target",
            several "layers", or several layers and as many "targets".
    """

    about: str
    sae: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: Literal["layer", "target", "layers", "targets"] = "layer"


class Kind(NamedTuple):
    """A class and one of its presets."""

    sae: type[SparseAutoencoder]
    preset: Preset


def register(sae_class: _Class) -> _Class:
    """Registers an architecture under its configuration's name; usable as a decorator.

    Args:
        sae_class: a :class:`~sae_kernels.nn.SparseAutoencoder` with a ``config_class`` whose
            ``architecture`` nobody else has.

    Raises:
        ValueError: no name, or a name that another class has.
    """
    name = sae_class.config_class.architecture
    if not name:
        raise ValueError(
            f"{sae_class.config_class.__name__}.architecture: expected a name for files and "
            "commands, got an empty one; set it in the class"
        )
    known = _CLASSES.setdefault(name, sae_class)
    # The same module and name: the class was defined again (a notebook's cell, a reload).
    if (known.__module__, known.__qualname__) != (sae_class.__module__, sae_class.__qualname__):
        raise ValueError(
            f"architecture {name!r}: expected a name of its own for {sae_class.__qualname__}, it "
            f"is that of {known.__module__}.{known.__qualname__}"
        )
    _CLASSES[name] = sae_class
    return sae_class


@functools.cache
def _load_entry_points() -> None:
    """Registers the architectures that installed packages name as entry points."""
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        register(entry.load())


def architectures() -> dict[str, type[SparseAutoencoder]]:
    """Every known architecture by name, TopK first: it is the default of a run."""
    _load_entry_points()
    return dict(sorted(_CLASSES.items(), key=lambda item: item[0] != "topk"))


def architecture(name: object) -> type[SparseAutoencoder]:
    """The class of an architecture by name.

    Raises:
        ValueError: no such name; the message lists the known ones and says how to add one.

    Example:
        >>> from sae_kernels.nn import architecture
        >>> architecture("topk").__name__
        'TopKSAE'
    """
    known = architectures()
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"architecture: expected one of {', '.join(known)}, got {name!r:.80}; a class of your "
            "own becomes known with sae_kernels.nn.register"
        )
    return known[name]


def presets() -> dict[str, Kind]:
    """All presets with their classes, by the name that ``--arch`` takes."""
    return {
        name: Kind(sae, preset)
        for sae in architectures().values()
        for name, preset in sae.presets.items()
    }


def preset(name: str) -> Kind:
    """Looks up an architecture's class and preset by a name that ``--arch`` takes.

    Raises:
        ValueError: no such name; the message suggests the nearest.

    Example:
        >>> from sae_kernels.nn import preset
        >>> preset("transcoder").sae.__name__
        'TopKSAE'
    """
    known = presets()
    if name not in known:
        raise ValueError(f"arch: expected a preset, got {name!r:.80}; {name_hint(name, known)}")
    return known[name]


def build(config: SAEConfig, **options: Any) -> SparseAutoencoder:
    """A fresh module of the configuration's architecture.

    Args:
        config: of a known architecture.
        options: arguments of :class:`~sae_kernels.nn.SparseAutoencoder` (seed, device, ...).

    Example:
        >>> from sae_kernels.nn import JumpReLUConfig, build
        >>> type(build(JumpReLUConfig(d_in=8, n_latents=32))).__name__
        'JumpReLUSAE'
    """
    return architecture(config.architecture)(config, **options)


def from_weights(config: SAEConfig, weights: dict[str, torch.Tensor]) -> SparseAutoencoder:
    """A module in evaluation mode with these tensors as its weights, not copied.

    Raises:
        RuntimeError: tensors are missing, too many or of another shape; torch names them.
    """
    with torch.device("meta"):
        sae = build(config)
    sae.load_state_dict(weights, assign=True)
    return sae.eval()
