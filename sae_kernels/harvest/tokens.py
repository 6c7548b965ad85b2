"""Tokenizing documents into padded batches of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.harvest.chunks import by_length, cut_documents, limit_rows, windows
from sae_kernels.harvest.limits import check_ids, check_options, padding_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOW_BATCHES = 16  # sorted by length together, so that hardly any padding is computed


class TokenBatch(NamedTuple):
    """Token ids and attention mask of a batch of sequences.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: bool [B, S], false for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, inputs: TokenBatch | Tensor | Mapping[str, Tensor]) -> TokenBatch:
        """A batch from token ids [B, S] without padding, or from a tokenizer's output.

        Raises:
            ValueError: ids that are not whole numbers [B, S], or a mask of another shape.

        >>> TokenBatch.of(torch.tensor([[4, 5]])).attention_mask.tolist()
        [[True, True]]
        """
        if isinstance(inputs, Mapping):
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        else:
            ids, mask = (inputs, None) if isinstance(inputs, Tensor) else inputs
        if ids.ndim != 2 or ids.is_floating_point() or 0 in ids.shape:
            raise ValueError(
                f"expected token ids [B, S], whole numbers, got {ids.dtype} {list(ids.shape)}"
            )
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape:
            raise ValueError(
                f"expected an attention mask {list(ids.shape)}, as the ids, got {list(mask.shape)}"
            )
        return cls(ids.long(), mask.bool())

    def to(self, device: torch.device) -> TokenBatch:
        """This batch on another device."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device))

    def without_first(self) -> Tensor:
        """The attention mask [B, S] without the first attended token of each sequence."""
        return self.attention_mask & (self.attention_mask.cumsum(1) > 1)

    def replaced(self, keep_first: bool) -> Tensor:
        """The positions that a splice replaces, bool [B, S]."""
        return self.without_first() if keep_first else self.attention_mask


def token_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    batch_size: int = 8,
    context_length: int = 128,
    max_tokens: int | None = None,
) -> Iterator[TokenBatch]:
    """Tokenizes documents into batches, cut into chunks as by :func:`harvest`, special tokens kept.

    Args:
        model, tokenizer: the model, for its longest context, and its fast tokenizer.
        documents: texts.
        batch_size: chunks of full length in a batch; more if they are shorter.
        context_length: tokens in a chunk, special tokens included.
        max_tokens: stop after this many tokens.

    Raises:
        ModelError: a tokenizer that is not fast, a context longer than the model's; while
            iterating, a token that the model has no embedding of.
        ValueError: an option out of range.
    """
    check_options(model, tokenizer, batch_size, context_length, max_tokens, KEEP_ALL)
    budget = batch_size * context_length
    pad = padding_id(model, tokenizer)

    def batches() -> Iterator[TokenBatch]:
        chunks = cut_documents(tokenizer, documents, context_length, KEEP_ALL)
        whole = limit_rows(chunks, max_tokens)
        sequences = (chunk._replace(ids=chunk.ids[chunk.kept]) for chunk in whole)
        for window in windows(sequences, _WINDOW_BATCHES * budget):
            for chunk in window:
                check_ids(model, tokenizer, chunk)
            for numbers in by_length(window, budget):
                yield _padded([window[i].ids for i in numbers], pad)

    return batches()


def _padded(sequences: list[Tensor], pad: int) -> TokenBatch:
    ids = pad_sequence(sequences, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return TokenBatch(ids, torch.arange(ids.shape[1]) < lengths[:, None])
