"""Cheap sparse autoencoders: fused encode, decode, backward and optimizer kernels.

``import sae_kernels as sk`` offers everything that most work needs, and every sub-package as an
attribute (``sk.nn``, ``sk.step``). Nothing is imported before it is asked for, torch included.

Legend of every shape in this package: B tokens, D d_in, F n_latents, K kept per token.

Example:
    >>> import torch
    >>> import sae_kernels as sk
    >>> sae = sk.TopKSAE(8, 32, k=4)
    >>> run = sk.train(sae, torch.randn(512, 8), steps=10, batch_size=64)
    >>> x = torch.randn(3, 8)
    >>> codes = sae.encode(x)
    >>> codes.values.shape, sae.decode(codes).shape
    (torch.Size([3, 4]), torch.Size([3, 8]))
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from sae_kernels._version import __version__ as __version__

if TYPE_CHECKING:
    from sae_kernels import analyze as analyze
    from sae_kernels import backends as backends
    from sae_kernels import bench as bench
    from sae_kernels import codes as codes
    from sae_kernels import config as config
    from sae_kernels import data as data
    from sae_kernels import distributed as distributed
    from sae_kernels import errors as errors
    from sae_kernels import formats as formats
    from sae_kernels import functional as functional
    from sae_kernels import harvest as harvest
    from sae_kernels import integrations as integrations
    from sae_kernels import interventions as interventions
    from sae_kernels import io as io
    from sae_kernels import nn as nn
    from sae_kernels import plotting as plotting
    from sae_kernels import primitives as primitives
    from sae_kernels import report as report
    from sae_kernels import runs as runs
    from sae_kernels import step as step
    from sae_kernels import testing as testing
    from sae_kernels import training as training
    from sae_kernels.backends import use as use_backend  # noqa: F401
    from sae_kernels.codes import SparseCodes as SparseCodes
    from sae_kernels.config import OptimizerConfig as OptimizerConfig
    from sae_kernels.config import TrainConfig as TrainConfig
    from sae_kernels.formats.load import load as load
    from sae_kernels.functional import encode_batch_topk as encode_batch_topk
    from sae_kernels.functional import encode_jumprelu as encode_jumprelu
    from sae_kernels.functional import encode_threshold as encode_threshold
    from sae_kernels.functional import encode_topk as encode_topk
    from sae_kernels.functional.decode import decode as decode
    from sae_kernels.integrations import accelerate as accelerate
    from sae_kernels.interventions import intervene as intervene
    from sae_kernels.interventions import watch as watch
    from sae_kernels.nn import BatchTopKConfig as BatchTopKConfig
    from sae_kernels.nn import BatchTopKSAE as BatchTopKSAE
    from sae_kernels.nn import GatedConfig as GatedConfig
    from sae_kernels.nn import GatedSAE as GatedSAE
    from sae_kernels.nn import JumpReLUConfig as JumpReLUConfig
    from sae_kernels.nn import JumpReLUObjective as JumpReLUObjective
    from sae_kernels.nn import JumpReLUSAE as JumpReLUSAE
    from sae_kernels.nn import ReLUConfig as ReLUConfig
    from sae_kernels.nn import ReLUObjective as ReLUObjective
    from sae_kernels.nn import ReLUSAE as ReLUSAE
    from sae_kernels.nn import SparseAutoencoder as SparseAutoencoder
    from sae_kernels.nn import SwitchConfig as SwitchConfig
    from sae_kernels.nn import SwitchObjective as SwitchObjective
    from sae_kernels.nn import SwitchSAE as SwitchSAE
    from sae_kernels.nn import TopKConfig as TopKConfig
    from sae_kernels.nn import TopKObjective as TopKObjective
    from sae_kernels.nn import TopKSAE as TopKSAE
    from sae_kernels.step import AutogradStep as AutogradStep
    from sae_kernels.step import FusedStep as FusedStep
    from sae_kernels.training import train as train
    from sae_kernels.training import train_many as train_many
    from sae_kernels.training.evaluate import evaluate as evaluate

# The same for whoever runs the package: each room, and what the front door offers of it.
_OFFERED: dict[str, tuple[str, ...]] = {
    "analyze": (),
    "backends": ("use_backend",),
    "bench": (),
    "codes": ("SparseCodes",),
    "config": ("OptimizerConfig", "TrainConfig"),
    "data": (),
    "distributed": (),
    "errors": (),
    "formats": ("load",),
    "functional": (
        "decode",
        "encode_batch_topk",
        "encode_jumprelu",
        "encode_threshold",
        "encode_topk",
    ),
    "harvest": (),
    "integrations": ("accelerate",),
    "interventions": ("intervene", "watch"),
    "io": (),
    "nn": (
        "BatchTopKConfig",
        "BatchTopKSAE",
        "GatedConfig",
        "GatedSAE",
        "JumpReLUConfig",
        "JumpReLUObjective",
        "JumpReLUSAE",
        "ReLUConfig",
        "ReLUObjective",
        "ReLUSAE",
        "SparseAutoencoder",
        "SwitchConfig",
        "SwitchObjective",
        "SwitchSAE",
        "TopKConfig",
        "TopKObjective",
        "TopKSAE",
    ),
    "plotting": (),
    "primitives": (),
    "report": (),
    "runs": (),
    "step": ("AutogradStep", "FusedStep"),
    "testing": (),
    "training": ("evaluate", "train", "train_many"),
}
_ROOM = {name: room for room, names in _OFFERED.items() for name in names}
_OWN_NAMES = {"use_backend": "use"}  # where the room's name is another

__all__ = sorted(["__version__", *_OFFERED, *_ROOM])

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Imports what is asked for the first time."""
    if name in _ROOM:
        room = importlib.import_module(f"{__name__}.{_ROOM[name]}")
        value = getattr(room, _OWN_NAMES.get(name, name))
    elif name in _OFFERED:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
