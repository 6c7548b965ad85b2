"""SAELens' ``cfg.json``, in the words of its version 6 and of older ones."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import DataError
from sae_kernels.formats.layout import configure
from sae_kernels.formats.origin import OURS, described, own_fields
from sae_kernels.io.tensor_files import flag, read_settings, whole
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
    from collections.abc import Callable
    from pathlib import Path

SCALER_FILE = "activation_scaler.json"
WHITENED = "covariance_whitening"
_MAKERS: dict[str, Callable[..., SAEConfig]] = {
    "standard": ReLUConfig,
    "topk": TopKConfig,
    "abstopk": TopKConfig,
    "batchtopk": BatchTopKConfig,
    "matryoshka_batchtopk": BatchTopKConfig,
    "jumprelu": JumpReLUConfig,
    "gated": GatedConfig,
    "matching_pursuit": MatchingPursuitConfig,
    "transcoder": ReLUConfig,
    "skip_transcoder": ReLUConfig,
    "jumprelu_transcoder": JumpReLUConfig,
    "jumprelu_skip_transcoder": JumpReLUConfig,
}
# What sae-lens 6.54.12 registers beside these (its __init__.py).
_ELSEWHERE = ("temporal",)
# What configurations before version 6 hold of the model, beside the rest: loaded with SAELens they
# become metadata (LLM_METADATA_KEYS of its pretrained_sae_loaders.py).
_OLD_METADATA = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    **{
        name: name
        for name in (
            "model_name",
            "model_class_name",
            "model_from_pretrained_kwargs",
            "hook_name",
            "hook_layer",
            "hook_head_index",
            "hook_name_out",
            "hook_layer_out",
            "hook_head_index_out",
            "hf_hook_name",
            "hf_hook_name_out",
            "context_size",
            "prepend_bos",
            "exclude_special_tokens",
            "seqpos_slice",
            "dataset_path",
            "neuronpedia_id",
            "sae_lens_version",
            "sae_lens_training_version",
        )
    },
}
# Keys of which the configuration and the tensors say all.
READ = (
    *("d_in", "d_sae", "d_out", "dtype", "device", "k", "apply_b_dec_to_input"),
    *("normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm"),
    *("activation_fn", "activation_fn_str", "activation_fn_kwargs", "finetuning_scaling_factor"),
    *("max_iterations", "residual_threshold", "stop_on_duplicate_support"),
)
# Theirs by ours.
PLACE = {
    "model": "model_name",
    "layer": "hf_hook_name",
    "target_layer": "hf_hook_name_out",
    "hook_name": "hook_name",
    "hook_name_out": "hook_name_out",
    "context_length": "context_size",
    "dataset": "dataset_path",
}


def read_config(path: Path) -> dict[str, Any]:
    """A configuration in the words of version 6, whichever version wrote it.

    Raises:
        DataError: no such file, or a damaged one.
    """
    values = {"architecture": "standard"} | read_settings(path)
    activation = values.get("activation_fn_str", values.get("activation_fn", "relu"))
    if activation == "topk":
        kwargs = values.get("activation_fn_kwargs")
        values |= {
            "architecture": "topk",
            "k": kwargs.get("k") if isinstance(kwargs, dict) else None,
        }
    elif activation != "relu":
        values["architecture"] = f"{values['architecture']} with {activation}"
    if "metadata" not in values:
        old = {key: values.pop(key) for key in _OLD_METADATA if key in values}
        values["metadata"] = {_OLD_METADATA[key]: v for key, v in old.items() if v is not None}
    if not isinstance(values["metadata"], dict):
        raise DataError(f"{path}: metadata: expected an object, got {values['metadata']!r:.80}")
    of_heads = "hook_z" in str(values["metadata"].get("hook_name", ""))
    values.setdefault("reshape_activations", "hook_z" if of_heads else "none")
    return values


def to_metadata(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Ours: the model and the place in it, and all fields that are not interpreted."""
    theirs = values["metadata"]
    own = own_fields(path, values, (*READ, "metadata"))
    own["metadata"] = own_fields(path, theirs, ("sae_kernels_version",))
    if OURS in own["metadata"]:
        own[OURS] = own["metadata"].pop(OURS)
    return described("saelens", own, **{ours: theirs.get(key) for ours, key in PLACE.items()})


def to_config(
    path: Path, values: dict[str, Any], log_threshold: bool, activation_scale: float | None = None
) -> SAEConfig:
    """Ours.

    Args:
        path, values: from `read_config`.
        log_threshold: whether the weights hold it.
        activation_scale: the factor of activations, for a file that asks for one without having it.

    Raises:
        DataError: an architecture, a normalisation or a value that is not here.
        ValueError: a factor for a file that does not ask for it.
    """
    architecture = values["architecture"]
    if architecture in _ELSEWHERE:
        raise DataError(
            f"{path}: SAELens' architecture {architecture!r}, which sae_kernels does not have (it "
            f"has {', '.join(_MAKERS)})"
        )
    if not isinstance(architecture, str) or architecture not in _MAKERS:
        raise DataError(
            f"{path}: architecture: expected one of {', '.join(_MAKERS)}, got {architecture!r:.80}"
        )
    if values["reshape_activations"] != "none":
        raise DataError(
            f"{path}: reshape_activations: expected 'none', got "
            f"{values['reshape_activations']!r:.40}: the SAE reads the heads of an attention layer "
            "side by side; set it to 'none' and give activations [..., n_heads * d_head]"
        )
    transcoder, skip = architecture.endswith("transcoder"), "skip" in architecture
    make = _MAKERS[architecture]
    scale = _activation_scale(path, values.get("normalize_activations"), activation_scale)
    # SAELens divides the decoder by the factor, a transcoder's too.
    options: dict[str, Any] = {"target_scale": scale} if transcoder else {}
    if make in (TopKConfig, BatchTopKConfig):
        options["k"] = values.get("k")
        # A file without the key is of a version that did not rescale.
        options["rank_by_decoder_norm"] = flag(path, values, "rescale_acts_by_decoder_norm", False)
    if architecture == "abstopk":
        options |= {"relu": "none", "by_magnitude": True}
    if make is BatchTopKConfig:
        options["threshold_rule"] = "sae_lens"
        options["groups"] = _groups(path, values)
    if make is JumpReLUConfig:
        options["log_threshold"] = log_threshold
    centres = not transcoder and flag(path, values, "apply_b_dec_to_input", True)
    if make is MatchingPursuitConfig:
        centres = True  # or its b_dec is not read at all
        most = values.get("max_iterations")
        options |= {
            "k": whole(path, values, "d_in") if most is None else most,
            "residual_threshold": values.get("residual_threshold", 0.01),
            "stop_on_repeat": flag(path, values, "stop_on_duplicate_support", True),
        }
    return configure(
        path,
        make,
        d_in=whole(path, values, "d_in"),
        n_latents=whole(path, values, "d_sae"),
        d_out=whole(path, values, "d_out") if transcoder else None,
        skip=skip,
        subtract_b_dec=centres,
        unit_norm_decoder=False,
        activation_scale=scale,
        **options,
    )


def _groups(path: Path, values: dict[str, Any]) -> list[int] | None:
    """A Matryoshka SAE's groups; SAELens lists where they end, and adds the last end itself."""
    ends = values.get("matryoshka_widths")
    if ends is None:
        return None
    if not isinstance(ends, list) or not all(isinstance(end, int) for end in ends):
        raise DataError(f"{path}: matryoshka_widths: expected a list of integers, got {ends!r:.80}")
    n_latents = whole(path, values, "d_sae")
    ends = [0, *ends] if ends[-1:] == [n_latents] else [0, *ends, n_latents]
    return [end - start for start, end in pairwise(ends)]


def _activation_scale(path: Path, normalisation: object, given: float | None) -> float:
    """The factor of activations: given, or in the folder of a training run."""
    scaled = normalisation in (True, "expected_average_only_in")
    if given is not None and not scaled:
        raise ValueError(
            f"activation_scale: expected none, as {path} has normalize_activations "
            f"{normalisation!r:.40}; got {given!r}"
        )
    if normalisation in (None, False, "none", WHITENED):
        return 1.0
    if not scaled:
        raise DataError(
            f"{path}: normalize_activations: expected 'none', got {normalisation!r:.40}: this SAE "
            "normalises every activation by itself, which none here does"
        )
    scaler = path.with_name(SCALER_FILE)
    factor: Any = read_settings(scaler).get("scaling_factor") if scaler.is_file() else None
    if given is not None and factor is not None:
        raise ValueError(
            f"activation_scale: expected none, as {scaler} holds {factor!r:.40}; got {given!r}"
        )
    if given is None and factor is None:
        raise DataError(
            f"{path}: normalize_activations: expected 'none', got {normalisation!r}: the SAE reads "
            "activations times a factor that its folder does not hold; give it with "
            "activation_scale (convert: --activation-scale), sqrt(d_in) over the activations' mean "
            "norm in its training"
        )
    scale: float = factor if given is None else given  # the configuration checks it
    return scale
