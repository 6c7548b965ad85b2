"""The architectures by the names people know them by: a configuration and the settings that fit."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from sae_kernels.errors import name_hint
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    SwitchConfig,
    TopKConfig,
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """An architecture with a name.

    Attributes:
        config: the kind of configuration.
        about: one line for people.
        sae: defaults of the configuration that differ from the class's.
        train: the same for :class:`~sae_kernels.config.TrainConfig`.
        data: what it is trained on: a "layer", a layer and another as its "target", or "layers".
    """

    config: type[SAEConfig]
    about: str
    sae: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: Literal["layer", "target", "layers"] = "layer"


_PENALISED = {"loss": "mse", "auxk_alpha": 0.0, "target_l0": 32.0}
_FREE_NORMS = {"unit_norm_decoder": False}
_TRANSCODES = {"subtract_b_dec": False, **_FREE_NORMS}
_NESTED = (16, 16, 8, 4, 2)  # a Matryoshka SAE's groups, as parts of the latents

PRESETS = {
    "topk": Preset(TopKConfig, "the k largest latents of every token"),
    "multi_topk": Preset(
        TopKConfig, "TopK whose 4k reconstruction counts too", train={"multi_topk": True}
    ),
    "batchtopk": Preset(BatchTopKConfig, "the k B largest latents of a batch of B tokens"),
    "matryoshka": Preset(
        BatchTopKConfig, "BatchTopK whose first latents reconstruct alone", sae={"groups": _NESTED}
    ),
    "matryoshka_topk": Preset(
        TopKConfig, "TopK whose first latents reconstruct alone", sae={"groups": _NESTED}
    ),
    "jumprelu": Preset(
        JumpReLUConfig,
        "a learned threshold per latent, L0 held at a target",
        sae={"threshold_init": 1.0, "bandwidth": 0.1},  # where pre-activations have unit variance
        train={"sparsity": "target_l0", "target_l0": 32.0, "sparsity_coefficient": 0.3}
        | {"auxk_alpha": 0.0},
    ),
    "relu": Preset(
        ReLUConfig,
        "ReLU and an L1 penalty",
        train=_PENALISED | {"sparsity": "l1", "sparsity_coefficient": 3.0},
    ),
    "relu_april": Preset(
        ReLUConfig,
        "ReLU and L1 weighted by free decoder norms",
        sae=_FREE_NORMS,
        train=_PENALISED
        | {"sparsity": "l1", "sparsity_coefficient": 3.0, "sparsity_norm_weighted": True}
        | {"clip_norm": 1.0},
    ),
    "p_anneal": Preset(
        ReLUConfig,
        "ReLU and an L_p penalty, p falling from 1",
        train=_PENALISED | {"sparsity": "lp", "sparsity_coefficient": 3.0},
    ),
    "gated": Preset(
        GatedConfig,
        "a gate decides which latents fire, L1 on the gate",
        train=_PENALISED | {"sparsity": "l1", "sparsity_coefficient": 3.0},
    ),
    "switch": Preset(
        SwitchConfig,
        "one of several small TopK SAEs for every token",
        train={"balance_coefficient": 0.3, "auxk_alpha": 0.0},
    ),
    "transcoder": Preset(
        TopKConfig, "TopK from one activation to another", sae=_TRANSCODES, data="target"
    ),
    "skip_transcoder": Preset(
        TopKConfig,
        "the same with a linear skip connection",
        sae=_TRANSCODES | {"skip": True},
        data="target",
    ),
    "crosscoder": Preset(
        BatchTopKConfig,
        "BatchTopK over several layers or models together",
        sae=_FREE_NORMS | {"rank_by_decoder_norm": True, "decoder_norm": "sum"},
        data="layers",
    ),
    "crosscoder_relu": Preset(
        ReLUConfig,
        "the same with ReLU and L1 weighted by the sum of norms",
        sae=_FREE_NORMS | {"decoder_norm": "sum"},
        train=_PENALISED
        | {"sparsity": "l1", "sparsity_coefficient": 3.0, "sparsity_norm_weighted": True},
        data="layers",
    ),
}


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: no such name; the message has the nearest.

    Example:
        >>> preset("transcoder").config.__name__
        'TopKConfig'
    """
    if name not in PRESETS:
        raise ValueError(
            f"arch: expected one of {', '.join(PRESETS)}, got {name!r}; "
            f"{name_hint(name, list(PRESETS))}"
        )
    return PRESETS[name]


def nested_groups(n_latents: int, parts: tuple[int, ...] = _NESTED) -> tuple[int, ...]:
    """Group sizes that are these parts of the latents; the last takes what is left.

    Example:
        >>> nested_groups(100)
        (6, 6, 12, 25, 51)
    """
    if n_latents < len(parts):
        raise ValueError(
            f"n_latents: expected at least {len(parts)} for as many groups, got {n_latents}"
        )
    sizes = [max(1, n_latents // part) for part in parts[:-1]]
    return (*sizes, n_latents - sum(sizes))
