"""Prepares end-to-end training: the layer's width, and a fresh SAE for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.config.row_filter import DEFAULT_FILTER, RowFilter
from sae_kernels.data.sample import SAMPLE
from sae_kernels.data.windows import permutation
from sae_kernels.errors import ModelError
from sae_kernels.harvest.model import input_device, layer_device
from sae_kernels.harvest.norms import NormBound
from sae_kernels.harvest.splice import clean_logits, frozen, record, replaced_rows
from sae_kernels.harvest.spread import spread
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.training.end_to_end.loss import EndToEnd, downstream_outputs, require_model
from sae_kernels.training.fresh import fitted, warn_of_few_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SAEConfig, SparseAutoencoder

_AHEAD = 1 << 22  # tokens that the sample for scale and b_dec is spread over


def layer_width(model: nn.Module, layer: str, weights: EndToEnd | None = None) -> int:
    """The width D of a layer, from one token; checks that the downstream layers come after it.

    Raises:
        ModelError, ValueError: as :func:`~sae_kernels.training.end_to_end.end_to_end_loss`, as far
            as the model and its layers go.
    """
    require_model(model)
    weights = weights or EndToEnd()
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    layers = (layer, *weights.downstream_layers)
    with frozen(model), torch.no_grad(), record(model, layers) as outputs:
        clean_logits(model, TokenBatch.of(token))
    if layer not in outputs:
        raise ModelError(f"{layer}: expected a layer that runs, it did not; choose a whole block")
    downstream_outputs(outputs, layer, weights)
    return outputs[layer].shape[-1]


def prepare_end_to_end(
    model: nn.Module,
    batches: Iterable[TokenBatch | Tensor | Mapping[str, Tensor]],
    layer: str,
    sae_config: SAEConfig,
    config: TrainConfig,
    *,
    row_filter: RowFilter = DEFAULT_FILTER,
) -> SparseAutoencoder:
    """Makes a fresh SAE for a layer of a model, on the layer's device.

    Its scale and b_dec are estimated on 16384 of the layer's activations to replace, as
    :func:`~sae_kernels.training.train` does on stored ones. They are of batches spread evenly over
    the text, or over its first 4 million tokens, on at most 65536 of which the model runs; of
    batches that can be iterated only once they are of the first ones.

    Args:
        model: left as it was.
        batches: token ids or :class:`~sae_kernels.harvest.TokenBatch`.
        layer: the dotted path of the layer that the SAE will reconstruct.
        sae_config: the SAE; its scale is replaced by the estimate if config asks.
        config: normalize_activations, init_b_dec, k_start, seed and on_nonfinite are used.
        row_filter: activations whose norm is more than its ``max_norm_multiple`` times the median
            of the sample keep the model's own, here and in
            :func:`~sae_kernels.training.end_to_end.end_to_end_loss`, which finds the bound in the
            SAE's metadata. Which tokens are replaced the batches say; the filter's other settings
            are recorded.

    Raises:
        ModelError: no such layer, or one without an output [B, S, D].
        ValueError: no tokens; a layer of another width than the SAE.
        NonFiniteError: the layer puts out NaN or infinity.
    """
    chosen = _chosen(batches, config.order_seed)
    total = sum(map(_size, chosen))
    if not total:
        raise ValueError("expected text with at least one token to replace, got none")
    rows = [
        x[permutation(len(x), config.order_seed, i)[: -(-len(x) * SAMPLE // total)].to(x.device)]
        for i, x in enumerate(replaced_rows(model, chosen, layer))
    ]
    sample = torch.cat(rows)
    norms = NormBound(row_filter.max_norm_multiple, [sample.shape[1]])
    sample = sample[norms.kept(sample)]
    warn_of_few_rows(sample)
    sae = fitted(sample, sae_config, config, layer_device(model, layer))
    sae.metadata["activations"] = norms.facts(row_filter)
    return sae


def _chosen(
    batches: Iterable[TokenBatch | Tensor | Mapping[str, Tensor]], seed: int
) -> list[TokenBatch]:
    """The batches whose activations are the sample."""
    once = iter(batches) is batches
    first = _until((TokenBatch.of(batch) for batch in batches), SAMPLE if once else _AHEAD)
    return list(first) if once else spread(first, _size, 4 * SAMPLE, seed)


def _until(batches: Iterable[TokenBatch], n: int) -> Iterator[TokenBatch]:
    """The first batches, up to the one with which they have n tokens to replace."""
    for batch in batches:
        yield batch
        n -= _size(batch)
        if n <= 0:
            return


def _size(batch: TokenBatch) -> int:
    return int(batch.replaced.sum())
