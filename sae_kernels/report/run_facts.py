"""The subtitle, settings and headline results on the page of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sae_kernels.plotting.units import number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.training.evaluate import Evaluation

    from .run_data import RunActivations

# Of the many settings of training, what a reader asks for first.
_TRAIN = ("steps", "batch_size", "lr", "loss", "sparsity", "sparsity_coefficient", "target_l0",
          "auxk_alpha", "compute", "route", "seed", "data_seed")  # fmt: skip
_SAE = ("d_in", "n_latents", "d_out", "n_layers", "k", "groups", "skip", "threshold_init",
        "bandwidth")  # fmt: skip


def subtitle(
    sae: SparseAutoencoder, checkpoint: str | None, measured: Evaluation | None, training: bool
) -> str:
    """One sentence: what was trained, how far the run is, and on which data it was measured."""
    config = sae.config
    text = f"{config.architecture}, {config.n_latents:,} latents of {config.input_width:,} inputs"
    if checkpoint is not None:
        text += f", as of checkpoint {checkpoint} of a run that is not finished"
    if measured is None:
        return f"{text}. Not measured on any activations: the numbers are those of training."
    if training:
        return (
            f"{text}. Measured on {measured.n_tokens:,} tokens that it was trained on: on new text "
            "it may do worse."
        )
    return f"{text}. Measured on {measured.n_tokens:,} tokens that were given for it."


def facts(
    tables: Mapping[str, Any],
    sae: SparseAutoencoder,
    activations: RunActivations | None,
    last: Mapping[str, Any],
) -> dict[str, str]:
    """The settings of a run and facts about its weights, by name."""
    of_sae, of_training = sae.config.to_dict(), training_settings(tables)
    settings = {name: of_sae.get(name) for name in _SAE}
    settings |= {name: of_training.get(name) for name in _TRAIN}
    found = {"architecture": str(tables.get("arch", sae.config.architecture))}
    found |= {name: _text(value) for name, value in settings.items() if _says(name, value)}
    if last:
        found["trained so far"] = f"{last['step']:,} steps, {last.get('tokens', 0):,} tokens"
    for name, value in tables.get("data", {}).items():
        found[f"data: {name}"] = _text(value)
    if activations is not None:
        folders = [*activations.layers, *activations.targets]
        found["measured on"] = ", ".join(str(data.folder) for data in folders)
    return found | weights(sae)


def training_settings(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The training, objective and optimizer settings of a run, by name."""
    return {k: v for n in ("train", "objective", "optimizer") for k, v in tables.get(n, {}).items()}


def weights(sae: SparseAutoencoder) -> dict[str, str]:
    """Facts about the weights: number, dtype and decoder norms."""
    norms = sae.decoder_norms().detach()
    low, median, high = (float(v) for v in (norms.min(), norms.median(), norms.max()))
    spread = f"{number(median)} (from {number(low)} to {number(high)})"
    spread = number(median) if number(low) == number(high) else spread
    return {
        "parameters": f"{sum(p.numel() for p in sae.parameters()):,}",
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "median norm of decoder rows": spread,
    }


def results(
    measured: Evaluation | None, last: Mapping[str, Any], result: Mapping[str, Any]
) -> dict[str, float]:
    """Results by name: the evaluation, then training's own dead latents, time and speed."""
    found: dict[str, float] = {}
    if measured is not None:
        scalars = measured.scalars()
        layers = {f"fvu_of_layer_{i}": v for i, v in enumerate(scalars.pop("layer_fvu", ()))}
        found = {name: v for name, v in scalars.items() if name != "n_tokens"} | layers
    dead = result.get("dead_fraction", last.get("dead_fraction"))
    speed, tokens = last.get("tokens_per_second"), last.get("tokens")
    seconds = result.get("seconds", tokens / speed if speed and tokens else None)
    own = {"dead_fraction": dead, "seconds": seconds, "tokens_per_second": speed}
    return found | {name: float(value) for name, value in own.items() if value is not None}


def dead_rule(tokens: int | None, dead_after_tokens: int | None) -> str:
    """The trainer's rule for dead latents in words, to follow "12 of 3,072 latents".

    >>> dead_rule(50_000, 10_000_000)
    'did not fire in the last 50,000 training tokens'
    """
    least = min(math.inf if n is None else n for n in (tokens, dead_after_tokens))
    if least == math.inf:
        return "did not fire for long in training"
    return f"did not fire in the last {least:,} training tokens"


def _says(name: str, value: object) -> bool:
    """Whether to show a setting; those that are switched off are left out."""
    if name == "n_layers":
        return value != 1
    return name == "seed" or value not in (None, False, "none", 0)


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
