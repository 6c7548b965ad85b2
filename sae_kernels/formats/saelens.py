"""SAELens' folders: ``cfg.json`` and ``sae_weights.safetensors`` (its version 6, and older ones).

The encoder lies transposed, W_enc [D, F]. Read are what ``save_model`` and ``save_inference_model``
write and the checkpoints of its training runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.errors import DataError
from sae_kernels.formats.layout import Weights, at_least_zero, check, from_foreign, load
from sae_kernels.formats.saelens_config import WHITENED, read_config, to_config, to_metadata
from sae_kernels.formats.saelens_whitening import WHITENING_FILE, fold_whitening
from sae_kernels.io.tensor_files import Stored, Tensors, stored_safetensors
from sae_kernels.nn import BatchTopKConfig, GatedConfig, JumpReLUConfig, MatchingPursuitConfig

if TYPE_CHECKING:
    from sae_kernels.nn import SAEConfig

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"


def read_saelens(folder: str | Path, *, activation_scale: float | None = None) -> Weights:
    """Reads an SAE that SAELens saved.

    Codes are those of SAELens, but for ``rescale_acts_by_decoder_norm``: there SAELens' codes are
    ours times the norm of the decoder's row, and reconstructions are the same. A negative JumpReLU
    threshold becomes 0 (SAELens' ReLU says so); a per-latent scaling factor from fine-tuning is
    multiplied into the decoder. The scale of an unfinished training run is `activation_scale`, its
    covariance whitening is folded into the weights.

    Args:
        folder: with cfg.json and sae_weights.safetensors.
        activation_scale: the factor of activations, for an SAE of
            ``normalize_activations = "expected_average_only_in"`` whose folder does not hold it.

    Raises:
        DataError: files missing or damaged, an architecture or normalisation that is not here,
            tensors that are not what the configuration says.
        ValueError: a factor for a file that does not ask for it.

    Example:
        >>> import tempfile, torch
        >>> from sae_kernels.formats import read_saelens, write_saelens
        >>> from sae_kernels.nn import ReLUConfig
        >>> tensors = {name: torch.zeros(size) for name, size in ReLUConfig(2, 3).shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_saelens(folder, ReLUConfig(2, 3), tensors, {"activations": {"layer": "h.3"}})
        ...     read_saelens(folder).metadata["activations"]["hook_name"]
        'blocks.3.hook_resid_post'
    """
    path, values, stored, config = _open(Path(folder), activation_scale)
    tied = isinstance(config, MatchingPursuitConfig)
    others = {} if tied else {"scaling_factor": config.n_latents}
    found = load(stored, config, names(config), others)
    factor = found.pop("scaling_factor", None)
    tensors = from_foreign(stored.path, config, names(config), found)
    _fold_scaling_factor(stored.path, values, tensors, factor)
    if isinstance(config, JumpReLUConfig) and not config.log_threshold:
        tensors["threshold"] = at_least_zero(tensors["threshold"])
    if tied and not values.get("apply_b_dec_to_input", True):
        tensors["b_dec"].zero_()
    if values.get("normalize_activations") == WHITENED:
        config = fold_whitening(path.with_name(WHITENING_FILE), config, tensors)
    return Weights(config, tensors, to_metadata(path, values))


def describe_saelens(folder: str | Path) -> SAEConfig:
    """What an SAE is, by its settings and the names of its tensors; no weights are read."""
    return _open(Path(folder), None).config


class _Opened(NamedTuple):
    """A folder of which only the settings and the weights' header are read."""

    path: Path
    values: dict[str, Any]
    stored: Stored
    config: SAEConfig


def _open(folder: Path, activation_scale: float | None) -> _Opened:
    path = folder / CONFIG_FILE
    values = read_config(path)
    stored = stored_safetensors(folder / WEIGHTS_FILE)
    config = to_config(path, values, "log_threshold" in stored.sizes, activation_scale)
    return _Opened(path, values, stored, config)


def names(config: SAEConfig) -> dict[str, str]:
    """SAELens' names by ours."""
    theirs = {"W_enc": "W_enc.T"}
    if isinstance(config, GatedConfig):
        theirs["b_enc"] = "b_gate"
    if isinstance(config, BatchTopKConfig):
        theirs["threshold"] = "topk_threshold"
    return {name: theirs.get(name, name) for name in config.shapes()}


def _fold_scaling_factor(
    path: Path, values: dict[str, Any], tensors: Tensors, factor: torch.Tensor | None
) -> None:
    """Codes times a factor, then decoded, are the codes decoded by rows times the factor."""
    if factor is None:
        return
    W_dec = tensors["W_dec"]
    check(path, {"scaling_factor": (len(W_dec),)}, {"scaling_factor": factor})
    if torch.allclose(factor, torch.ones_like(factor)):
        return
    if not values.get("finetuning_scaling_factor"):
        raise DataError(
            f"{path}: scaling_factor: expected ones where {CONFIG_FILE} does not say "
            "finetuning_scaling_factor, got others"
        )
    tensors["W_dec"] = (W_dec * factor[:, None]).to(W_dec.dtype)
