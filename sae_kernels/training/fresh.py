"""Prepares an SAE for training: estimates scales and b_dec on a sample of activations."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

from sae_kernels.data.rows import estimate_scale
from sae_kernels.data.sample import SAMPLE, concentration, sample_rows
from sae_kernels.data.sources import is_rows, open_source
from sae_kernels.errors import NonFiniteError
from sae_kernels.gpu import training_device
from sae_kernels.nn import SparseAutoencoder, build

if TYPE_CHECKING:
    import torch

    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.data.rows import RowSource
    from sae_kernels.data.shared import Share
    from sae_kernels.data.sources import Stream
    from sae_kernels.distributed.latents import LatentRanks

_FEW = 0.01  # part of the rows that should carry less than half of the variance


def prepare(
    source: Any, sae: SAEConfig | SparseAutoencoder, config: TrainConfig
) -> SparseAutoencoder:
    """Estimates the scales and b_dec of an SAE on a sample from everywhere in the source.

    Args:
        source: anything that :func:`~sae_kernels.training.train` takes; for a transcoder rows of
            inputs and targets side by side.
        sae: a configuration, or a module that is changed in place.
        config: the settings of training.

    Returns:
        The module, on the device of the settings.

    Raises:
        ValueError, NonFiniteError: as :func:`~sae_kernels.training.train`.

    Example:
        >>> import torch
        >>> from sae_kernels.config import TrainConfig
        >>> from sae_kernels.nn import TopKConfig
        >>> config = TrainConfig(batch_size=16, device="cpu")
        >>> prepare(torch.randn(64, 8), TopKConfig(8, 32, k=4), config).b_dec.shape
        torch.Size([8])
    """
    return Samples(open_source(source)).prepared(sae, config)


class Samples:
    """A sample of a source, read once, on which several SAEs are prepared."""

    def __init__(self, source: RowSource | Stream) -> None:
        self.source = source
        self._sample: torch.Tensor | None = None

    def prepared(
        self,
        sae: SAEConfig | SparseAutoencoder,
        config: TrainConfig,
        share: Share | None = None,
        ranks: LatentRanks | None = None,
    ) -> SparseAutoencoder:
        """An SAE, or some of its latents, prepared on the sample or its share of the columns.

        All SAEs here share one order of the data.
        """
        device = training_device(config.device)
        width = self.source.d_in if share is None else share.own.d_in
        check_width(width, sae.config if isinstance(sae, SparseAutoencoder) else sae)
        self._check_batch(config)
        if self._sample is None:
            self._sample = self._read(config)
            warn_of_few_rows(self._sample)
        own = self._sample if share is None else share.rows(self._sample)
        return fitted(own, sae, config, device, ranks)

    def _check_batch(self, config: TrainConfig) -> None:
        source = self.source
        if not is_rows(source):
            if source.batch_size != config.batch_size:
                raise ValueError(
                    f"batch_size: expected {source.batch_size}, as the stream's batches, got "
                    f"{config.batch_size}"
                )
        elif source.n_tokens < config.batch_size:
            raise ValueError(
                f"batch_size: expected at most the {source.n_tokens} rows of activations, "
                f"got {config.batch_size}"
            )

    def _read(self, config: TrainConfig) -> torch.Tensor:
        if not is_rows(self.source):
            return self.source.sample(SAMPLE)
        return sample_rows(self.source, SAMPLE, config.order_seed)


def fitted(
    sample: torch.Tensor,
    sae: SAEConfig | SparseAutoencoder,
    config: TrainConfig,
    device: torch.device,
    ranks: LatentRanks | None = None,
) -> SparseAutoencoder:
    """Estimates scales and b_dec on raw rows, as the settings say, and fits where training starts.

    A module that was loaded or trained before stays the same function: its weights adapt to the
    new scales (learning rates are meant for scaled activations), and b_dec is not estimated.

    Args:
        sample: [n, input width]; for a transcoder inputs and targets side by side.
        sae: a configuration, or a module that is changed in place.
        config: the settings of training.
        device: device of the SAE.
        ranks: processes that an SAE made of a configuration is spread over; None: all is here.

    Raises:
        ValueError: rows of another width than the SAE's, a k_start that does not fit.
        NonFiniteError: NaN or infinity in the sample with "stop"; no finite row with "skip".

    Example:
        >>> import torch
        >>> from sae_kernels.config import TrainConfig
        >>> from sae_kernels.nn import TopKConfig
        >>> sample = torch.full((10, 4), 3.0)
        >>> sae = fitted(sample, TopKConfig(4, 8, 2), TrainConfig(), torch.device("cpu"))
        >>> round(sae.config.activation_scale, 4), [round(b, 4) for b in sae.b_dec.tolist()]
        (0.3333, [1.0, 1.0, 1.0, 1.0])
    """
    sae_config = sae.config if isinstance(sae, SparseAutoencoder) else sae
    check_width(sample.shape[1], sae_config)
    if config.k_start is not None and config.k_start > sae_config.largest_k:
        raise ValueError(
            f"k_start: expected at most {sae_config.largest_k}, as many as a token can keep, got "
            f"{config.k_start}"
        )
    sample = _finite(sample, config).float().to(device)
    x, target = split(sample, sae_config)
    scales: dict[str, float] = {}
    if config.normalize_activations == "sqrt_d":
        scales["activation_scale"] = estimate_scale(x, x.shape[0])
        if target is not None:
            scales["target_scale"] = estimate_scale(target, target.shape[0])
    if not isinstance(sae, SparseAutoencoder):
        whole = dataclasses.replace(sae_config, **scales)
        latents = None if ranks is None else ranks.latents
        sae = build(whole, seed=config.seed, device=device, latents=latents)
    elif sae.is_fresh:
        sae.to(device).config = dataclasses.replace(sae_config, **scales)
    else:
        if scales:
            sae.rescale_(**scales)
        return sae.to(device)
    centres = {"geometric_median": (), "mean": (lambda rows: rows.mean(0),)}
    if config.init_b_dec in centres:
        sae.initialise_b_dec_(x if target is None else target, *centres[config.init_b_dec])
    scaled = x * sae.config.activation_scale
    sae.start_training_(scaled, config.objective or sae.objective_class(), ranks)
    return sae


def warn_of_few_rows(sample: torch.Tensor) -> None:
    """Warns if a hundredth of the rows of a sample, or fewer, carry half of its variance.

    A hundredth and not less: one sink in a context of 128 tokens is 0.8 % of the rows.

    Example:
        >>> import torch
        >>> rows = torch.ones(1000, 4)
        >>> rows[::200] = 100.0
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn_of_few_rows(rows)
        >>> print(str(caught[0].message)[:70])
        activations: 3 of 1,000 sampled rows (0.30 %) carry half of the varian
    """
    rows = sample[sample.isfinite().all(1)]
    few = concentration(rows).rows_of_half if len(rows) else 0
    if not 0 < few <= _FEW * len(rows):
        return
    norms = rows.float().norm(dim=1)
    warnings.warn(
        f"activations: {few:,} of {len(rows):,} sampled rows ({100 * few / len(rows):.2f} %) carry "
        f"half of the variance, with norms up to {float(norms.max()):.3g}, the median being "
        f"{float(norms.median()):.3g}: the loss and FVU are mostly about these few. Such rows are "
        "often first tokens or BOS; leave them out by --max-norm-multiple 10, --drop-first or "
        "--drop-tokens of harvest, or of training on a model (row_filter in Python)",
        UserWarning,
        stacklevel=3,
    )


def _finite(sample: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    finite = sample.isfinite().all(1)
    if not (finite.any() if config.on_nonfinite == "skip" else finite.all()):
        raise NonFiniteError(
            "activations: expected finite numbers, got NaN or infinity in the sample; "
            "find what wrote them"
        )
    return sample[finite]


def check_width(width: int, sae_config: SAEConfig) -> None:
    """Raises ValueError for rows of another width than the SAE's input (and target)."""
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
    """Splits rows into inputs and targets; no target where the SAE reconstructs its input."""
    if not sae_config.transcodes:
        return rows, None
    return rows[:, : sae_config.input_width], rows[:, sae_config.input_width :]
