"""What a model and its tokenizer can do: refusals in words, before the first document if possible.

Read from top to bottom: :func:`check_options` needs no forward pass, :func:`probe` runs one
sequence, :func:`check_ids` looks at each chunk of the text.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import nn

from sae_kernels.errors import ModelError
from sae_kernels.harvest.model import resolve_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sae_kernels.config.row_filter import RowFilter
    from sae_kernels.harvest.chunks import Chunk

_UNLIMITED = 10**9  # a model_max_length above it, such as 1e30, says that nobody has set one
# What a model raises for inputs that it cannot take, from Python and from PyTorch.
_REFUSALS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def check_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    context_length: int,
    max_tokens: int | None,
    row_filter: RowFilter,
) -> None:
    """Refuses a model, a tokenizer and options that do not go together.

    Raises:
        ModelError: a tokenizer that is not fast, a model that reads no token ids, or a context
            longer than the model's.
        ValueError: another option out of range.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"expected a fast tokenizer, got {type(tokenizer).__name__}")
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids" and "input_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"expected a model that reads token ids, {type(model).__name__} reads {main}; choose a "
            "language model"
        )
    least, most = tokenizer.num_special_tokens_to_add() + 1, longest_context(model, tokenizer)
    if context_length < least or (most is not None and context_length > most):
        kind = ValueError if context_length < least else ModelError
        upward = "or more" if most is None else f"to {most}"
        raise kind(
            f"expected context_length from {least} {upward} for this model, got {context_length}"
        )
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"expected batch_size and max_tokens of at least 1, got {batch_size} and {max_tokens}"
        )
    if row_filter.drop_tokens:
        known = set(tokenizer.get_vocab().values())
        if unknown := set(row_filter.drop_tokens) - known:
            raise ValueError(
                f"drop_tokens: expected ids of the vocabulary, 0 to {max(known)}, got "
                f"{min(unknown)}; tokenizer.convert_tokens_to_ids gives the id of a token"
            )


def longest_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokens that a model takes at once; None if neither it nor its tokenizer says.

    RoBERTa and its kin count positions from padding_idx + 1 on, so that 514 embeddings serve 512
    tokens. A sliding window of attention is no limit.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if stated < 1:  # XLNet has -1, T5 nothing: their attention is relative
        longest = tokenizer.model_max_length
        return longest if longest < _UNLIMITED else None
    usable = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, nn.Embedding)
        and module.padding_idx is not None
    ]
    return min([int(stated), *usable])


def probe(
    run: Callable[[int], list[torch.Tensor]],
    model: PreTrainedModel,
    layers: Sequence[str],
    length: int,
) -> list[torch.Tensor]:
    """Runs a model up to its layers on ``length`` tokens; the layers' outputs.

    Args:
        run: runs the model on one sequence of a length.
        model, layers: for the message.
        length: the longest sequence that will be asked for.

    Raises:
        ModelError: the model cannot run so. The message has the longest sequence that it takes, or
            the layers that token ids alone reach.
    """
    _refuse_decoder(model, layers)
    name = type(model).__name__
    try:
        return run(length)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except _REFUSALS as error:
        reason = f"({type(error).__name__}: {' '.join(str(error).split()):.200})"
        if longest := _longest_that_runs(run, length):
            raise ModelError(
                f"expected context_length up to {longest}, the longest that {name} takes, got "
                f"{length} {reason}"
            ) from error
        raise ModelError(
            f"expected {name} to run on token ids up to {', '.join(layers)}, it does not {reason}; "
            "choose a model, or the part of this one, that reads text alone and runs in "
            f"{model.dtype} on {model.device.type}"
        ) from error


def _refuse_decoder(model: PreTrainedModel, layers: Sequence[str]) -> None:
    """Raises ModelError for a layer of a decoder that reads an encoder.

    It needs tokens of its own; some models take those of the encoder, moved by one.
    """
    if not (model.config.is_encoder_decoder and hasattr(model, "get_decoder")):
        return
    encoder = model.get_encoder()
    refused = {*model.get_decoder().modules()} - {*encoder.modules()}
    for layer in layers:
        if resolve_layer(model, layer) in refused:
            (part,) = (name for name, module in model.named_modules() if module is encoder)
            stacks = [n for n, m in encoder.named_children() if isinstance(m, nn.ModuleList)]
            raise ModelError(
                f"expected a layer that reads the text alone, got {layer} of a decoder, which "
                "reads an encoder's output and its own; choose one of the encoder, such as "
                f"{'.'.join([part, *stacks[:1], '0'])}"
            )


def _longest_that_runs(run: Callable[[int], object], fails: int) -> int:
    """The longest sequence below one that fails; 0 if there is none."""
    runs = 0
    while fails - runs > 1:
        length = (runs + fails) // 2 if runs else 1  # most that fail do so at any length
        try:
            run(length)
        except _REFUSALS:
            fails = length
        else:
            runs = length
    return runs


def padding_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a batch up: the tokenizer's, or 0 if it has none inside the embedding.

    Padding is masked, so that any id which the model knows will do.
    """
    pad, known = tokenizer.pad_token_id, _embedded(model)
    return 0 if pad is None or (known is not None and pad >= known) else int(pad)


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chunk: Chunk) -> None:
    """Raises ModelError for a chunk with a token that the model has no embedding of."""
    known = _embedded(model)
    if known is None or not len(chunk.ids) or (largest := int(chunk.ids.max())) < known:
        return
    raise ModelError(
        f"document {chunk.document}: expected tokens that the model knows, 0 to {known - 1}, got "
        f"{largest}, {tokenizer.convert_ids_to_tokens(largest)!r}; use the tokenizer that belongs "
        f"to the model, or give it embeddings by resize_token_embeddings({len(tokenizer)})"
    )


def _embedded(model: PreTrainedModel) -> int | None:
    """The number of tokens that a model embeds, or None if it does not say."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None
