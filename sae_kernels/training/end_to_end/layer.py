"""Prepares end-to-end training: the layer's width, and a fresh SAE for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.errors import ModelError
from sae_kernels.harvest.model import input_device, layer_device, layer_output, resolve_layer
from sae_kernels.harvest.splice import clean_logits, frozen, record
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.training.end_to_end.loss import EndToEnd, downstream_outputs, require_model
from sae_kernels.training.fresh import fitted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SAEConfig, SparseAutoencoder

_SAMPLE = 16384  # tokens from which scale and b_dec are estimated


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
    keep_first: bool = False,
) -> SparseAutoencoder:
    """Makes a fresh SAE for a layer of a model, on the layer's device.

    Its scale and b_dec are estimated on the layer's output for the first 16384 tokens, as
    :func:`~sae_kernels.training.train` does on stored activations.

    Args:
        model: left as it was.
        batches: token ids or :class:`~sae_kernels.harvest.TokenBatch`.
        layer: the dotted path of the layer that the SAE will reconstruct.
        sae_config: the SAE; its scale is replaced by the estimate if config asks.
        config: normalize_activations, init_b_dec, k_start, seed and on_nonfinite are used.
        keep_first: leave out the first token of each sequence, as the splice will.

    Raises:
        ModelError: no such layer, or one without an output [B, S, D].
        ValueError: no tokens; a layer of another width than the SAE.
        NonFiniteError: the layer puts out NaN or infinity.
    """
    rows: list[Tensor] = []
    for x in _layer_rows(model, batches, layer, keep_first):
        rows.append(x)
        if sum(map(len, rows)) >= _SAMPLE:
            break
    if not sum(map(len, rows)):
        raise ValueError("expected text with at least one token to replace, got none")
    device = layer_device(model, layer)
    return fitted(torch.cat(rows)[:_SAMPLE], sae_config, config, device)


def _layer_rows(
    model: nn.Module,
    batches: Iterable[TokenBatch | Tensor | Mapping[str, Tensor]],
    layer: str,
    keep_first: bool,
) -> Iterator[Tensor]:
    """Yields a layer's output [n, D] at the tokens to replace, per batch."""
    module = resolve_layer(model, layer)
    device = input_device(model)
    for inputs in batches:
        batch = TokenBatch.of(inputs).to(device)
        mask = batch.attention_mask.long()
        with frozen(model), torch.no_grad():
            x = layer_output(model, module, input_ids=batch.input_ids, attention_mask=mask)
        yield x[batch.replaced(keep_first).to(x.device)]
