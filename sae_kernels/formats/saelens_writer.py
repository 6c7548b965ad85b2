"""Writing the folder that SAELens loads with ``SAE.load_from_disk``."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from sae_kernels._version import __version__
from sae_kernels.formats.layout import (
    check,
    only_raw_activations,
    to_foreign,
    weight_dtype,
)
from sae_kernels.formats.origin import own_of, place_of, rest
from sae_kernels.formats.saelens import CONFIG_FILE, WEIGHTS_FILE, names
from sae_kernels.formats.saelens_config import PLACE, READ
from sae_kernels.formats.thresholds import check_not_negative, with_thresholds
from sae_kernels.io.files import json_writer, publish_all
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatchingPursuitConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from sae_kernels.io.tensor_files import Tensors

# Of the layout, not of a package: an older number makes SAELens read the file as an old one.
_LAYOUT = "6.0.0"
_FIRST = 6  # major version of this layout
_ARCHITECTURES = {
    ReLUConfig: "standard",
    TopKConfig: "topk",
    JumpReLUConfig: "jumprelu",
    GatedConfig: "gated",
    MatchingPursuitConfig: "matching_pursuit",
}
# By the architecture and whether there is a skip connection.
_TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}


def write_saelens(
    folder: str | Path,
    config: SAEConfig,
    tensors: Tensors,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes an SAE or a transcoder for SAELens, complete or not at all.

    BatchTopK becomes JumpReLU with its threshold for every latent, as SAELens itself saves it
    (over the decoder rows' norms where they rank), and a JumpReLU's log_threshold its exponential.
    Thresholds are rounded down, which leaves comparisons with fp32 values as they were. Settings of
    training (groups, unit norm) are not part of the format.

    Args:
        folder: made when missing; its two files are replaced.
        config, tensors: the SAE, by our names, as `Weights` has them.
        metadata: as `Weights` has them: the model and the hook (``"activations"``), what a SAELens
            file held (``"saelens"``), and the rest. SAELens runs a model without an SAE that names
            no hook, so that is a warning.

    Raises:
        ValueError, TypeError: an SAE that SAELens has no class for, or metadata that JSON lacks.
        DataError: tensors that are not what the configuration says.

    Example:
        >>> import json, pathlib, tempfile, torch
        >>> config = TopKConfig(2, 3, k=1)
        >>> tensors = {name: torch.zeros(size) for name, size in config.shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_saelens(folder, config, tensors, {"activations": {"layer": "h.5"}})
        ...     json.loads(pathlib.Path(folder, "cfg.json").read_text())["metadata"]["hook_name"]
        'blocks.5.hook_resid_post'
    """
    only_raw_activations("SAELens", config)
    check("tensors", config.shapes(), tensors)
    config, tensors = _inference(config, tensors)
    values = _values(config, weight_dtype(tensors), metadata or {})
    if (missing := _nameless(config, values["metadata"])) is not None:
        warnings.warn(missing, stacklevel=2)
    theirs = to_foreign("tensors", config, names(config), tensors)
    publish_all(
        folder,
        {
            WEIGHTS_FILE: lambda path: save_file(theirs, path),
            CONFIG_FILE: json_writer(values),
        },
    )


def _values(config: SAEConfig, dtype: torch.dtype, metadata: Mapping[str, Any]) -> dict[str, Any]:
    architecture, own = _architecture(config), own_of(metadata, "saelens", READ)
    # Settings of another architecture, as of the training that ended in this one, say nothing here.
    kept = own if own.get("architecture") == architecture else {}
    values = {
        **kept,
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.n_latents,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _metadata(own_of(own, "metadata"), metadata),
    }
    if isinstance(config, TopKConfig):
        values |= {"k": config.k, "rescale_acts_by_decoder_norm": config.rank_by_decoder_norm}
    if isinstance(config, MatchingPursuitConfig):
        values |= {
            "max_iterations": config.k,
            "residual_threshold": config.residual_threshold,
            "stop_on_duplicate_support": config.stop_on_repeat,
        }
    if config.transcodes:
        values["d_out"] = config.output_width
    return values


def _metadata(own: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    place = place_of(ours)
    version = own.get("sae_lens_version")
    major = version.partition(".")[0] if isinstance(version, str) else ""
    return {
        "sae_lens_training_version": None,  # SAELens takes a missing one for its own
        **own,
        **{theirs: place[name] for name, theirs in PLACE.items() if name in place},
        **rest(ours, "saelens"),
        "sae_kernels_version": __version__,
        "sae_lens_version": version if major.isdigit() and int(major) >= _FIRST else _LAYOUT,
    }


def _nameless(config: SAEConfig, metadata: dict[str, Any]) -> str | None:
    """What SAELens needs to know and the metadata lack, in words; None if nothing."""
    needed = {"hook_name": "--hook-name"}
    if config.transcodes:
        needed["hook_name_out"] = "--hook-name-out"
    missing = [name for name in needed if not metadata.get(name)]
    if not missing:
        return None
    return (
        f"SAELens: {' and '.join(missing)} not known: it would run the model without this SAE and "
        f"say so in its log alone; name it with {' and '.join(needed[n] for n in missing)}, as "
        "blocks.6.hook_resid_post"
    )


def _architecture(config: SAEConfig) -> str:
    plain = _ARCHITECTURES[type(config)]
    if isinstance(config, TopKConfig) and config.by_magnitude:
        plain = "abstopk"
    if not config.transcodes:
        return plain
    if (plain, config.skip) not in _TRANSCODERS:
        raise ValueError(
            f"SAELens: expected a ReLU, JumpReLU or BatchTopK transcoder, got {plain}: it has no "
            "class for that"
        )
    return _TRANSCODERS[plain, config.skip]


def _inference(config: SAEConfig, tensors: Tensors) -> tuple[SAEConfig, Tensors]:
    """The form that SAELens runs: JumpReLU for BatchTopK, thresholds for their logarithms."""
    if type(config) not in (*_ARCHITECTURES, BatchTopKConfig):
        raise ValueError(f"SAELens: it has no class for {type(config).__name__}")
    if isinstance(config, TopKConfig) and config.relu == "none" and not config.by_magnitude:
        raise ValueError(
            "SAELens: expected relu 'after' or 'before', or by_magnitude, got relu 'none': its "
            "TopK drops negative values"
        )
    config, tensors = with_thresholds("SAELens", config, tensors)
    if isinstance(config, JumpReLUConfig):
        check_not_negative("SAELens", tensors["threshold"])
    return config, tensors
