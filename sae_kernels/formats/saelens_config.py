"""SAELens' ``cfg.json``, in the words of its version 6 and of older ones."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import DataError
from sae_kernels.formats.layout import configure
from sae_kernels.io.tensor_files import flag, read_settings, whole
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCALER_FILE = "activation_scaler.json"
_MAKERS: dict[str, Callable[..., SAEConfig]] = {
    "standard": ReLUConfig,
    "topk": TopKConfig,
    "batchtopk": BatchTopKConfig,
    "matryoshka_batchtopk": BatchTopKConfig,
    "jumprelu": JumpReLUConfig,
    "gated": GatedConfig,
    "transcoder": ReLUConfig,
    "skip_transcoder": ReLUConfig,
    "jumprelu_transcoder": JumpReLUConfig,
    "jumprelu_skip_transcoder": JumpReLUConfig,
}
# What configurations before version 6 hold of the model, beside the rest.
_OLD_METADATA = {
    "model_name": "model_name",
    "hook_point": "hook_name",
    "hook_name": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_head_index": "hook_head_index",
    "context_size": "context_size",
    "prepend_bos": "prepend_bos",
    "dataset_path": "dataset_path",
    "neuronpedia_id": "neuronpedia_id",
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
    known = {_OLD_METADATA[key]: value for key, value in values.items() if key in _OLD_METADATA}
    values.setdefault("metadata", {key: v for key, v in known.items() if v is not None})
    of_heads = "hook_z" in str(known.get("hook_name", ""))
    values.setdefault("reshape_activations", "hook_z" if of_heads else "none")
    if not isinstance(values["metadata"], dict):
        raise DataError(f"{path}: metadata: expected an object, got {values['metadata']!r:.80}")
    return values


def to_config(path: Path, values: dict[str, Any], log_threshold: bool) -> SAEConfig:
    """Ours; log_threshold is what the weights hold.

    Raises:
        DataError: an architecture, a normalisation or a value that is not here.
    """
    architecture = values["architecture"]
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
    options: dict[str, Any] = {}
    if make in (TopKConfig, BatchTopKConfig):
        options["k"] = values.get("k")
        # A file without the key is of a version that did not rescale.
        options["rank_by_decoder_norm"] = flag(path, values, "rescale_acts_by_decoder_norm", False)
    if make is BatchTopKConfig:
        options["threshold_rule"] = "sae_lens"
        options["groups"] = _groups(path, values)
    if make is JumpReLUConfig:
        options["log_threshold"] = log_threshold
    return configure(
        path,
        make,
        d_in=whole(path, values, "d_in"),
        n_latents=whole(path, values, "d_sae"),
        d_out=whole(path, values, "d_out") if transcoder else None,
        skip=skip,
        subtract_b_dec=not transcoder and flag(path, values, "apply_b_dec_to_input", True),
        unit_norm_decoder=False,
        activation_scale=_activation_scale(path, values.get("normalize_activations")),
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


def _activation_scale(path: Path, normalisation: object) -> float:
    """The factor of activations, which only a training run's folder holds."""
    if normalisation in (None, False, "none"):
        return 1.0
    if normalisation not in (True, "expected_average_only_in"):
        raise DataError(
            f"{path}: normalize_activations: expected 'none', got {normalisation!r:.40}: this SAE "
            "normalises every activation by itself, which none here does"
        )
    scaler = path.with_name(SCALER_FILE)
    factor = read_settings(scaler).get("scaling_factor") if scaler.is_file() else None
    if factor is None:
        raise DataError(
            f"{path}: normalize_activations: expected 'none', got {normalisation!r}: the SAE reads "
            "activations times a factor that its folder does not hold; in SAELens call "
            "sae.fold_activation_norm_scaling_factor(factor) and save it again"
        )
    return factor  # type: ignore[no-any-return]  # the configuration checks it
