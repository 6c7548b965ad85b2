"""What activations come from, as the trainer sees it, and the sample that fresh SAEs fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from sae_kernels.data.batches import Batches, RowSource, ShuffledBatches, TensorRows
from sae_kernels.step.compute import training_device
from sae_kernels.training.fresh import check_width, fresh_sae

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SAEConfig, SparseAutoencoder

_SAMPLE = 16384  # rows from which scale and b_dec are estimated


class Stream(Batches, Protocol):
    """Batches that come from no set of rows, such as a model's while it reads text."""

    d_in: int
    batch_size: int

    def sample(self, n: int) -> torch.Tensor:
        """The first n rows, without moving on."""


Source = RowSource | torch.Tensor | Stream


def is_rows(source: RowSource | Stream) -> TypeIs[RowSource]:
    """Whether any row can be asked for, and not only the next batch."""
    return hasattr(source, "rows")


def prepare(source: Source, sae_config: SAEConfig, config: TrainConfig) -> SparseAutoencoder:
    """A fresh SAE whose scales and b_dec are estimated on a random sample of the source.

    A transcoder's source holds its targets too, to the right of its inputs.
    """
    source = TensorRows(source) if isinstance(source, torch.Tensor) else source
    return Samples(source).fresh(sae_config, config)


class Samples:
    """The rows from which fresh SAEs are estimated, read once."""

    def __init__(self, source: RowSource | Stream) -> None:
        self.source = source
        self._sample: torch.Tensor | None = None

    def fresh(self, sae_config: SAEConfig, config: TrainConfig) -> SparseAutoencoder:
        """An SAE of these settings; all that come here have one order of the data."""
        device = training_device(config.device)
        check_width(self.source.d_in, sae_config)
        self._check_batch(config)
        if self._sample is None:
            self._sample = self._read(config)
        return fresh_sae(self._sample, sae_config, config, device)

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
            return self.source.sample(_SAMPLE)
        rows = min(_SAMPLE, self.source.n_tokens)
        return next(ShuffledBatches(self.source, rows, seed=config.order_seed))


def batches_of(source: RowSource | Stream, config: TrainConfig, reuse: bool) -> Batches:
    """The batches of a source in the order of a run; ``reuse`` as of ShuffledBatches."""
    if is_rows(source):
        return ShuffledBatches(source, config.batch_size, seed=config.order_seed, reuse=reuse)
    return source
