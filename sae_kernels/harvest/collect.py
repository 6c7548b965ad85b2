"""Harvesting: runs a model on documents and stores the activations of one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.config.row_filter import DEFAULT_FILTER, RowFilter
from sae_kernels.data.shard_writer import ShardWriter
from sae_kernels.harvest.chunks import cut_documents, limit_rows, windows
from sae_kernels.harvest.limits import check_options
from sae_kernels.harvest.norms import NormBound
from sae_kernels.harvest.rows import LayerRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows sorted by length together; enough that hardly any padding is computed.
_WINDOW_ROWS = 32768


def harvest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    layer: str,
    folder: str | Path,
    *,
    batch_size: int = 16,
    context_length: int = 128,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    row_filter: RowFilter = DEFAULT_FILTER,
    rows_per_shard: int = 65536,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Stores a layer's output for every token of the documents; returns the number of rows.

    Documents longer than `context_length` are cut into chunks that the model sees one by one. Rows
    are stored in the order of the text, with their token and document number, so a row's context
    is its neighbours of the same document. Padding is never stored. Memory does not grow with the
    number of documents, which may be an endless generator.

    Args:
        model: put in evaluation mode; it stays on its device.
        tokenizer: a fast tokenizer.
        documents: the texts.
        layer: dotted path of a module whose output, or its first element, is [batch, length, D].
        folder: written as `ShardWriter` does.
        batch_size: chunks of full length in a forward pass; more if they are shorter.
        context_length: tokens in a chunk, special tokens included.
        max_tokens: stop after this many rows; those of enormous norm count, although they are left
            out.
        dtype: stored dtype.
        autocast: run the model in this dtype, such as bfloat16 on hardware that has it.
        row_filter: which rows are left out; by default those of special tokens, and those whose
            norm is more than 10 times the median norm of the first window, of 32768 rows or
            ``rows_per_shard`` if those are fewer. Bound and count are in the index.
        rows_per_shard, overwrite: see `ShardWriter`.
        metadata: stored besides the model, layer and options.
        progress: called with the number of new rows, as `tqdm.update` expects.

    Raises:
        ModelError: an unknown layer, one with another output, or whatever else the model or its
            tokenizer cannot do (:mod:`sae_kernels.harvest.limits`).
        DataError: the folder holds a data set already.
        NonFiniteError: the layer's output holds NaN or infinity.
        ValueError, TypeError: an option out of range, documents that are not strings or empty.
    """
    if isinstance(documents, str):
        raise TypeError("expected an iterable of documents, got one string; put it in a list")
    check_options(model, tokenizer, batch_size, context_length, max_tokens, row_filter)
    layer_rows = LayerRows(model, tokenizer, [layer], batch_size, context_length, autocast)
    record = {
        "model": str(getattr(model.config, "_name_or_path", "")),
        "layer": layer,
        "context_length": context_length,
        **row_filter.to_dict(),
        "autocast": autocast and str(autocast).removeprefix("torch."),
        **(metadata or {}),
    }
    window_rows = max(min(_WINDOW_ROWS, rows_per_shard), context_length)
    chunks = cut_documents(tokenizer, documents, context_length, row_filter)
    held = torch.empty(window_rows, layer_rows.d_in, dtype=dtype)
    norms = NormBound(row_filter.max_norm_multiple, layer_rows.widths)
    total = stored = 0
    options: dict[str, Any] = {"rows_per_shard": rows_per_shard, "overwrite": overwrite}
    with ShardWriter(folder, layer_rows.d_in, dtype=dtype, metadata=record, **options) as writer:
        for window in windows(limit_rows(chunks, max_tokens), window_rows):
            rows = layer_rows.fill(window, held, progress)
            tokens = torch.cat([chunk.ids[chunk.kept] for chunk in window])
            numbers = torch.tensor([chunk.document for chunk in window])
            counts = torch.tensor([chunk.rows for chunk in window])
            kept = norms.kept(rows)
            writer.write(rows[kept], tokens[kept], numbers.repeat_interleave(counts)[kept])
            total += len(tokens)
            stored += int(kept.sum())
        if not total:
            raise ValueError("expected documents with at least one token, got none")
        writer.metadata |= norms.index_facts(0, total - stored)
    return stored
