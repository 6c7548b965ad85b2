"""Cutting documents into chunks of tokens, and batching chunks of similar length."""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

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


def cut_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int, row_filter: RowFilter
) -> Iterator[Chunk]:
    """Tokenizes documents in order into chunks of ``length``; the filter says which are kept.

    A document is encoded whole, without truncation, and its ids are cut here: the chunks without
    the added special tokens, joined, are the document's ids in their order, whatever truncation and
    padding the tokenizer is set to. Its settings stay as they are.

    Raises:
        TypeError: a document that is not a string.
        DataError: a document with half a surrogate pair, which is no character.
        ModelError: a tokenizer that adds tokens inside the text, not before and after it.
    """
    source = iter(documents)
    first = 0
    dropped = dropped_ids(tokenizer, row_filter)
    while texts := list(islice(source, _DOCUMENTS)):
        all_ids, before, after = _encode(tokenizer, texts, first)
        room = length - len(before) - len(after)
        for document, ids in enumerate(all_ids, first):
            for start in range(0, max(len(ids), 1), room):  # a document without tokens: one chunk
                chunk = torch.cat([before, ids[start : start + room], after])
                kept = ~torch.isin(chunk, dropped)
                kept[: row_filter.drop_first] = False
                if row_filter.drop_special_tokens:
                    kept[: len(before)] = kept[len(chunk) - len(after) :] = False
                yield Chunk(document, chunk, kept, int(kept.sum()))
        first += len(texts)


def dropped_ids(tokenizer: PreTrainedTokenizerBase, row_filter: RowFilter) -> Tensor:
    """The ids [n] of the tokens that are left out wherever they stand in a text.

    An unknown word is text: its token counts as special only if it is another one as well, as in
    GPT-2, where it is the end of a text too.
    """
    dropped = set(row_filter.drop_tokens)
    if row_filter.drop_special_tokens:
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        unknown = named.pop("unk_token", None)
        special = {*tokenizer.all_special_tokens}
        special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special -= {unknown} - {*named.values()}
        ids = map(tokenizer.backend_tokenizer.token_to_id, special)
        dropped.update(token for token in ids if token is not None)
    return torch.tensor(sorted(dropped), dtype=torch.long)


@contextmanager
def _whole(backend: Tokenizer) -> Iterator[None]:
    """Texts are neither truncated nor padded in the block, whatever the tokenizer is set to."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], first: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The ids of documents, numbered from ``first`` on, and what goes before and after each."""
    for document, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise TypeError(f"document {document}: expected a string, got {type(text).__name__}")
    with _whole(tokenizer.backend_tokenizer):
        try:
            encoded = tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # longer than the model's longest context they may be
            )
        except TypeError:  # of the tokenizer's own, which does not say of what
            for document, text in enumerate(texts, first):
                _check_characters(text, document)
            raise
        return [_ids(each) for each in encoded["input_ids"]], *_added(tokenizer, encoded.encodings)


def _ids(listed: list[int]) -> Tensor:
    return torch.tensor(listed, dtype=torch.long)


def _check_characters(text: str, document: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"document {document}: expected characters, got half a surrogate pair "
            f"({text[error.start]!a} at character {error.start}); mend it or leave it out"
        ) from None


def _added(tokenizer: PreTrainedTokenizerBase, encodings: list[Encoding]) -> tuple[Tensor, Tensor]:
    """The ids of the special tokens that the tokenizer adds before and after a text.

    They are read off the shortest document with a token. For those without any, all are before.
    """
    sample = min(encodings, key=lambda encoding: len(encoding) or math.inf)
    whole = tokenizer.backend_tokenizer.post_process(sample)
    special = whole.special_tokens_mask
    start = special.index(0) if 0 in special else len(special)
    end = start + len(sample)
    if whole.ids[start:end] != sample.ids or not all(special[end:]):
        raise ModelError(
            "expected a tokenizer that adds special tokens before and after the text, this one "
            f"makes {whole.tokens[:9]} of {sample.tokens[:9]}; mend its post-processor"
        )
    return _ids(whole.ids[:start]), _ids(whole.ids[end:])


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
