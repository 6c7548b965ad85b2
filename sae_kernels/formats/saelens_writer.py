"""Writing the folder that SAELens loads with ``SAE.load_from_disk``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from sae_kernels._version import __version__
from sae_kernels.formats.layout import (
    check,
    only_raw_activations,
    to_foreign,
    weight_dtype,
)
from sae_kernels.formats.saelens import CONFIG_FILE, WEIGHTS_FILE, names
from sae_kernels.io.files import json_writer, publish_all
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)
from sae_kernels.primitives.tensors import rounded_down

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sae_kernels.io.tensor_files import Tensors

# Of the layout, not of a package: an older number makes SAELens read the file as an old one.
_LAYOUT = "6.0.0"
_ARCHITECTURES = {
    ReLUConfig: "standard",
    TopKConfig: "topk",
    JumpReLUConfig: "jumprelu",
    GatedConfig: "gated",
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
        metadata: what SAELens should know of the model, such as model_name and hook_name.

    Raises:
        ValueError, TypeError: an SAE that SAELens has no class for, or metadata that JSON lacks.
        DataError: tensors that are not what the configuration says.

    Example:
        >>> import json, pathlib, tempfile
        >>> config = TopKConfig(2, 3, k=1)
        >>> tensors = {name: torch.zeros(size) for name, size in config.shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_saelens(folder, config, tensors, {"hook_name": "blocks.5.hook_resid_post"})
        ...     json.loads(pathlib.Path(folder, "cfg.json").read_text())["architecture"]
        'topk'
    """
    only_raw_activations("SAELens", config)
    check("tensors", config.shapes(), tensors)
    config, tensors = _inference(config, tensors)
    values = _values(config, weight_dtype(tensors), dict(metadata or {}))
    theirs = to_foreign("tensors", config, names(config), tensors)
    publish_all(
        folder,
        {
            WEIGHTS_FILE: lambda path: save_file(theirs, path),
            CONFIG_FILE: json_writer(values),
        },
    )


def _values(config: SAEConfig, dtype: torch.dtype, metadata: dict[str, Any]) -> dict[str, Any]:
    values = {
        "architecture": _architecture(config),
        "d_in": config.d_in,
        "d_sae": config.n_latents,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # SAELens takes a missing training version for its own.
        "metadata": {"sae_lens_training_version": None, "sae_kernels_version": __version__}
        | metadata
        | {"sae_lens_version": _LAYOUT},
    }
    if isinstance(config, TopKConfig):
        values |= {"k": config.k, "rescale_acts_by_decoder_norm": config.rank_by_decoder_norm}
    if config.transcodes:
        values["d_out"] = config.output_width
    return values


def _architecture(config: SAEConfig) -> str:
    plain = _ARCHITECTURES[type(config)]
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
    if isinstance(config, TopKConfig) and config.relu == "none":
        raise ValueError(
            "SAELens: expected relu 'after' or 'before', got 'none': its TopK drops negative values"
        )
    if isinstance(config, BatchTopKConfig):
        thresholds = _of_batch_topk(config, tensors)
    elif isinstance(config, JumpReLUConfig) and config.log_threshold:
        thresholds = tensors["log_threshold"].exp()
    elif isinstance(config, JumpReLUConfig):
        thresholds = _not_negative(tensors["threshold"])
    else:
        return config, tensors
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(SAEConfig)}
    kept = {n: t for n, t in tensors.items() if n not in ("threshold", "log_threshold")}
    return JumpReLUConfig(**shared, log_threshold=False), kept | {"threshold": thresholds}


def _not_negative(thresholds: torch.Tensor) -> torch.Tensor:
    if (lowest := float(thresholds.min())) < 0:
        raise ValueError(
            f"SAELens: expected thresholds of at least 0, got {lowest}: it would lose the latent's "
            "negative codes"
        )
    return thresholds


def _of_batch_topk(config: BatchTopKConfig, tensors: Tensors) -> torch.Tensor:
    """The threshold of every latent, [F]; SAELens saves its own BatchTopK in this way too."""
    threshold = tensors["threshold"].double()
    if threshold < 0:
        raise ValueError(
            f"SAELens: expected a threshold of at least 0, got {float(threshold)}: it is not set "
            "yet; train for some more steps first"
        )
    if config.rank_by_decoder_norm:
        norms = torch.linalg.vector_norm(tensors["W_dec"], dim=1, dtype=torch.float64)
        exact = torch.where(norms > 0, threshold / norms, torch.inf)
    else:
        exact = threshold.expand(config.n_latents)
    return rounded_down(exact.clamp(max=torch.finfo(torch.float32).max))
