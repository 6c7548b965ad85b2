"""Cutting documents into chunks of tokens, and batching chunks of similar length."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sae_kernels.config.row_filter import RowFilter

_DOCUMENTS = 64  # tokenized together


class Chunk(NamedTuple):
    """A document, or a piece of one of at most the context length, as tokens.

    Attributes:
        document: the document's number.
        ids: int64 [length], special tokens included.
        kept: bool [length], the tokens whose activations are kept.
        rows: the number of kept tokens.
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
    """Raises ModelError for a slow tokenizer and ValueError for options out of range."""
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


def cut_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int, row_filter: RowFilter
) -> Iterator[Chunk]:
    """Tokenizes documents in order into chunks of ``length``; the filter says which are kept."""
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
            kept = ~(torch.tensor(special, dtype=torch.bool) & row_filter.drop_special_tokens)
            ids = torch.tensor(ids, dtype=torch.long)
            kept[: row_filter.drop_first] = False
            kept &= ~torch.isin(ids, torch.tensor(row_filter.drop_tokens, dtype=torch.long))
            yield Chunk(first + document, ids, kept, int(kept.sum()))
        first += len(texts)


def limit_rows(chunks: Iterable[Chunk], max_tokens: int | None) -> Iterator[Chunk]:
    """The chunks that have kept tokens, ending after ``max_tokens`` of them in all."""
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
    """Groups consecutive chunks to windows of at most ``rows`` rows."""
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
    """Batches of a window's chunks by similar length, at most ``budget`` tokens with padding.

    Yields the chunks' numbers in the window.
    """
    batch: list[int] = []
    for number in sorted(range(len(window)), key=lambda i: -len(window[i].ids)):
        if batch and len(window[batch[0]].ids) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(number)
    yield batch
