"""Documents through a model, the activations of one layer to disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.data.shards import ShardWriter
from sae_kernels.harvest.chunks import check_options, cut, limited, windows
from sae_kernels.harvest.rows import LayerRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows held while batches run in order of length; enough that hardly any padding is computed.
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
    drop_special_tokens: bool = True,
    rows_per_shard: int = 65536,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Store a layer's output for every token of the documents; returns the number of tokens.

    Documents longer than `context_length` are cut in chunks that the model sees one by one. Rows
    come in the order of the text, with the token and the number of the document beside them, so
    the context of a row are its neighbours of the same document. Padding is never stored. Memory
    does not grow with the number of documents, which may be a generator without end.

    Args:
        model: left in evaluation mode, on the device where it is.
        tokenizer: a fast tokenizer.
        layer: the dotted path of a module that puts out [batch, length, D] or a tuple of it first.
        folder: written as `ShardWriter` does.
        batch_size: chunks of full length in a forward pass; of shorter ones as many more as fit.
        context_length: tokens in a chunk, special tokens among them.
        max_tokens: stop after this many rows.
        dtype: stored dtype.
        autocast: run the model in this dtype, such as bfloat16 on hardware that has it.
        drop_special_tokens: leave out what the tokenizer adds, such as [CLS].
        rows_per_shard, overwrite: see `ShardWriter`.
        metadata: joins what is stored about the model, layer and options.
        progress: called with the number of rows that are new, as `tqdm.update` expects.

    Raises:
        ModelError: an unknown layer, one without such an output, or a tokenizer that is not fast.
        DataError: the folder holds a data set already.
        NonFiniteError: the layer puts out NaN or infinity.
        ValueError, TypeError: an option out of range, documents that are not strings or empty.
    """
    if isinstance(documents, str):
        raise TypeError("expected an iterable of documents, got one string; put it in a list")
    check_options(model, tokenizer, batch_size, context_length, max_tokens)
    layer_rows = LayerRows(model, tokenizer, [layer], batch_size * context_length, autocast)
    record = {
        "model": str(getattr(model.config, "_name_or_path", "")),
        "layer": layer,
        "context_length": context_length,
        "special_tokens": not drop_special_tokens,
        "autocast": autocast and str(autocast).removeprefix("torch."),
        **(metadata or {}),
    }
    window_rows = max(min(_WINDOW_ROWS, rows_per_shard), context_length)
    chunks = cut(tokenizer, documents, context_length, drop_special_tokens)
    held = torch.empty(window_rows, layer_rows.d_in, dtype=dtype)
    total = 0
    options: dict[str, Any] = {"rows_per_shard": rows_per_shard, "overwrite": overwrite}
    with ShardWriter(folder, layer_rows.d_in, dtype=dtype, metadata=record, **options) as writer:
        for window in windows(limited(chunks, max_tokens), window_rows):
            rows = layer_rows.fill(window, held, progress)
            tokens = torch.cat([chunk.ids[chunk.kept] for chunk in window])
            numbers = torch.tensor([chunk.document for chunk in window])
            counts = torch.tensor([chunk.rows for chunk in window])
            writer.write(rows, tokens, numbers.repeat_interleave(counts))
            total += len(tokens)
        if not total:
            raise ValueError("expected documents with at least one token, got none")
    return total
