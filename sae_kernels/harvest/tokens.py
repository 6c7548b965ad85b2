"""Tokenizing documents into padded batches of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.harvest.chunks import by_length, cut_documents, windows
from sae_kernels.harvest.limits import check_ids, check_options, padding_id

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sae_kernels.config.row_filter import RowFilter
    from sae_kernels.harvest.chunks import Chunk

_WINDOW_BATCHES = 16  # sorted by length together, so that hardly any padding is computed


class TokenBatch(NamedTuple):
    """Token ids of a batch, and at which tokens an SAE's reconstruction replaces the activation.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: bool [B, S], false for padding.
        replaced: bool [B, S], the attended tokens whose activation a splice replaces; the others
            keep the model's own.
    """

    input_ids: Tensor
    attention_mask: Tensor
    replaced: Tensor

    @classmethod
    def of(cls, inputs: TokenBatch | Tensor | Mapping[str, Tensor]) -> TokenBatch:
        """A batch from token ids [B, S] without padding, or from a tokenizer's output.

        All attended tokens are replaced.

        Raises:
            ValueError: ids that are not whole numbers [B, S], or a mask of another shape.

        >>> TokenBatch.of(torch.tensor([[4, 5]])).attention_mask.tolist()
        [[True, True]]
        """
        if isinstance(inputs, TokenBatch):
            return inputs
        if isinstance(inputs, Mapping):
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        else:
            ids, mask = inputs, None
        if ids.ndim != 2 or ids.is_floating_point() or 0 in ids.shape:
            raise ValueError(
                f"expected token ids [B, S], whole numbers, got {ids.dtype} {list(ids.shape)}"
            )
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape:
            raise ValueError(
                f"expected an attention mask {list(ids.shape)}, as the ids, got {list(mask.shape)}"
            )
        return cls(ids.long(), mask.bool(), mask.bool())

    def to(self, device: torch.device) -> TokenBatch:
        """This batch on another device."""
        return TokenBatch(*(tensor.to(device) for tensor in self))

    def keeping_first(self, n: int = 1) -> TokenBatch:
        """This batch with the model's own activation at the first n attended tokens.

        >>> TokenBatch.of(torch.tensor([[4, 5]])).keeping_first().replaced.tolist()
        [[False, True]]
        """
        return self._replace(replaced=self.replaced & (self.attention_mask.cumsum(1) > n))


def token_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    batch_size: int = 8,
    context_length: int = 128,
    max_tokens: int | None = None,
    row_filter: RowFilter = KEEP_ALL,
) -> Iterator[TokenBatch]:
    """Tokenizes documents into batches, cut into chunks as by :func:`harvest`.

    Args:
        model, tokenizer: the model, for its longest context, and its fast tokenizer.
        documents: texts.
        batch_size: chunks of full length in a batch; more if they are shorter.
        context_length: tokens in a chunk, special tokens included.
        max_tokens: stop after this many tokens, special ones included.
        row_filter: which tokens keep the model's own activation, as the SAE was not trained on
            them: ``RowFilter.recorded(sae.metadata["activations"])`` tells, for one trained here.
            Norms are for the splice to look at.

    Raises:
        ModelError: a tokenizer that is not fast, a context longer than the model's; while
            iterating, a token that the model has no embedding of.
        ValueError: an option out of range.
    """
    check_options(model, tokenizer, batch_size, context_length, max_tokens, row_filter)
    budget = batch_size * context_length
    pad = padding_id(model, tokenizer)

    def batches() -> Iterator[TokenBatch]:
        chunks = cut_documents(tokenizer, documents, context_length, row_filter)
        for window in windows(_whole(chunks, max_tokens), _WINDOW_BATCHES * budget):
            for chunk in window:
                check_ids(model, tokenizer, chunk)
            for numbers in by_length(window, budget):
                yield _padded([window[i] for i in numbers], pad)

    return batches()


def _whole(chunks: Iterable[Chunk], max_tokens: int | None) -> Iterator[Chunk]:
    """The chunks with every token as a row, ending after ``max_tokens`` of them in all."""
    left = max_tokens
    for chunk in chunks:
        n = len(chunk.ids) if left is None else min(left, len(chunk.ids))
        if n:
            yield chunk._replace(ids=chunk.ids[:n], kept=chunk.kept[:n], rows=n)
        left = None if left is None else left - n
        if left == 0:
            return


def _padded(chunks: list[Chunk], pad: int) -> TokenBatch:
    ids = pad_sequence([chunk.ids for chunk in chunks], batch_first=True, padding_value=pad)
    replaced = pad_sequence([chunk.kept for chunk in chunks], batch_first=True)
    lengths = torch.tensor([len(chunk.ids) for chunk in chunks])
    return TokenBatch(ids, torch.arange(ids.shape[1]) < lengths[:, None], replaced)
