"""Documents as chunks of tokens, and chunks of like length together."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DOCUMENTS = 64  # tokenized at once


class Chunk(NamedTuple):
    """A document, or as much of one as the model sees at once.

    Attributes:
        document: its number.
        ids: int64 [length], special tokens included.
        kept: bool [length], which tokens count.
        rows: how many do.
    """

    document: int
    ids: Tensor
    kept: Tensor
    rows: int


def check_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    context_length: int,
    max_tokens: int | None,
) -> None:
    """Raises ModelError or ValueError for what :func:`cut` and the model cannot do."""
    if not tokenizer.is_fast:
        raise ModelError(f"expected a fast tokenizer, got {type(tokenizer).__name__}")
    least = tokenizer.num_special_tokens_to_add() + 1
    most = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    if not least <= context_length <= most:
        raise ValueError(
            f"expected context_length from {least} to {most} for this model, got {context_length}"
        )
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"expected batch_size and max_tokens of at least 1, got {batch_size} and {max_tokens}"
        )


def cut(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int, drop: bool
) -> Iterator[Chunk]:
    """The documents in order, cut to the length the model sees; ``drop`` special tokens."""
    source = iter(documents)
    first = 0
    while texts := list(islice(source, _DOCUMENTS)):
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        columns = ("overflow_to_sample_mapping", "input_ids", "special_tokens_mask")
        for document, ids, special in zip(*(encoded[name] for name in columns), strict=True):
            kept = ~torch.tensor(special, dtype=torch.bool) if drop else torch.ones(len(ids)).bool()
            ids = torch.tensor(ids, dtype=torch.long)
            yield Chunk(first + document, ids, kept, int(kept.sum()))
        first += len(texts)


def limited(chunks: Iterable[Chunk], max_tokens: int | None) -> Iterator[Chunk]:
    """Chunks with rows to keep, ``max_tokens`` rows in all."""
    left = max_tokens
    for chunk in chunks:
        if left is not None and chunk.rows >= left:
            kept = chunk.kept & (chunk.kept.cumsum(0) <= left)
            yield chunk._replace(kept=kept, rows=left)
            return
        if chunk.rows:
            yield chunk
            left = left and left - chunk.rows


def windows(chunks: Iterable[Chunk], rows: int) -> Iterator[list[Chunk]]:
    """Runs of chunks with at most ``rows`` rows together."""
    window: list[Chunk] = []
    held = 0
    for chunk in chunks:
        if held + chunk.rows > rows:
            yield window
            window, held = [], 0
        window.append(chunk)
        held += chunk.rows
    if window:
        yield window


def by_length(window: list[Chunk], budget: int) -> Iterator[list[int]]:
    """Numbers of chunks of like length that make at most ``budget`` tokens with their padding."""
    batch: list[int] = []
    for number in sorted(range(len(window)), key=lambda i: -len(window[i].ids)):
        if batch and len(window[batch[0]].ids) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(number)
    yield batch
