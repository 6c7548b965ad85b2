"""A fresh SAE that fits the activations it will be trained on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sae_kernels.data.batches import estimate_scale
from sae_kernels.errors import NonFiniteError
from sae_kernels.nn import build

if TYPE_CHECKING:
    import torch

    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SAEConfig, SparseAutoencoder


def fresh_sae(
    sample: torch.Tensor, sae_config: SAEConfig, config: TrainConfig, device: torch.device
) -> SparseAutoencoder:
    """An SAE whose scales and b_dec are estimated on a sample of raw rows, as config asks.

    Args:
        sample: [n, input width]; a transcoder's targets stand to the right of its inputs.
        sae_config: the SAE; its scales are replaced by the estimates.
        config: the settings.
        device: where the SAE is made.

    Raises:
        ValueError: rows of another width than the SAE's, a k_start that does not fit.
        NonFiniteError: NaN or infinity in the sample where config says "stop", or nothing else.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import TopKConfig
        >>> from sae_kernels.config import TrainConfig
        >>> sample = torch.full((10, 4), 3.0)
        >>> sae = fresh_sae(sample, TopKConfig(4, 8, 2), TrainConfig(), torch.device("cpu"))
        >>> round(sae.config.activation_scale, 4), [round(b, 4) for b in sae.b_dec.tolist()]
        (0.3333, [1.0, 1.0, 1.0, 1.0])
    """
    check_width(sample.shape[1], sae_config)
    if config.k_start is not None and config.k_start > sae_config.largest_k:
        raise ValueError(
            f"k_start: expected at most {sae_config.largest_k}, as many as a token can keep, got "
            f"{config.k_start}"
        )
    finite = sample.isfinite().all(1)
    if not (finite.any() if config.on_nonfinite == "skip" else finite.all()):
        raise NonFiniteError(
            "activations: expected finite numbers, got NaN or infinity among the first rows; "
            "find what wrote them"
        )
    sample = sample[finite].float().to(device)
    x, target = split(sample, sae_config)
    if config.activation_scale == "sqrt_d":
        scales: dict[str, Any] = {"activation_scale": estimate_scale(x, x.shape[0])}
        if target is not None:
            scales["target_scale"] = estimate_scale(target, target.shape[0])
        sae_config = dataclasses.replace(sae_config, **scales)
    sae = build(sae_config, seed=config.seed, device=device)
    target = x if target is None else target
    if config.init_b_dec == "geometric_median":
        sae.initialise_b_dec_(target)
    elif config.init_b_dec == "mean":
        sae.initialise_b_dec_(target, lambda rows: rows.mean(0))
    return sae


def check_width(width: int, sae_config: SAEConfig) -> None:
    """Raises ValueError for rows that are not as wide as what the SAE reads (and writes)."""
    layers = sae_config.n_layers
    if sae_config.transcodes:
        wanted = sae_config.input_width + sae_config.output_width
        if width != wanted:
            raise ValueError(
                f"expected activations of {sae_config.input_width} inputs and "
                f"{sae_config.output_width} targets side by side, got {width} columns; "
                "give the target's data with target"
            )
    elif layers == 1 and width != sae_config.d_in:
        raise ValueError(
            f"d_in: expected {width}, the width of the activations, got {sae_config.d_in}"
        )
    elif width != sae_config.input_width:
        raise ValueError(
            f"n_layers: expected activations of {layers} layers of d_in {sae_config.d_in} side by "
            f"side, got {width} columns"
        )


def split(rows: torch.Tensor, sae_config: SAEConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inputs and targets of rows that hold both; None where the input is its own target."""
    if not sae_config.transcodes:
        return rows, None
    return rows[:, : sae_config.input_width], rows[:, sae_config.input_width :]
