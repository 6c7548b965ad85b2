"""Documents through a model, the activations of one layer to disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sae_kernels.data.shards import ShardWriter
from sae_kernels.errors import ModelError
from sae_kernels.harvest.chunks import Chunk, by_length, check_options, cut, limited, windows
from sae_kernels.harvest.model import layer_output, resolve_layer

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
    module = resolve_layer(model, layer)
    check_options(model, tokenizer, batch_size, context_length, max_tokens)
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id or 0
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
    total = 0
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
    ):
        # One token tells the width, and what is wrong, before any work is done.
        probe = Chunk(0, torch.tensor([pad]), torch.tensor([True]), 1)
        d_in = _forward(model, module, [probe], pad).shape[1]
        held = torch.empty(window_rows, d_in, dtype=dtype)
        options: dict[str, Any] = {"rows_per_shard": rows_per_shard, "overwrite": overwrite}
        with ShardWriter(folder, d_in, dtype=dtype, metadata=record, **options) as writer:
            for window in windows(limited(chunks, max_tokens), window_rows):
                counts = torch.tensor([chunk.rows for chunk in window])
                places = torch.arange(int(counts.sum())).split(counts.tolist())
                for batch in by_length(window, batch_size * context_length):
                    rows = _forward(model, module, [window[i] for i in batch], pad)
                    held[torch.cat([places[i] for i in batch])] = rows.to("cpu", dtype)
                    if progress is not None:
                        progress(len(rows))
                tokens = torch.cat([chunk.ids[chunk.kept] for chunk in window])
                numbers = torch.tensor([chunk.document for chunk in window])
                writer.write(held[: len(tokens)], tokens, numbers.repeat_interleave(counts))
                total += len(tokens)
            if not total:
                raise ValueError("expected documents with at least one token, got none")
    return total


def _forward(model: PreTrainedModel, module: nn.Module, batch: list[Chunk], pad: int) -> Tensor:
    """The rows [n, D] of a batch of chunks, one chunk after the other."""
    device = next(model.parameters()).device
    ids = pad_sequence([chunk.ids for chunk in batch], batch_first=True, padding_value=pad)
    kept = pad_sequence([chunk.kept for chunk in batch], batch_first=True)
    lengths = torch.tensor([len(chunk.ids) for chunk in batch])
    attended = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    output = layer_output(
        model, module, input_ids=ids.to(device), attention_mask=attended.to(device)
    )
    if output.ndim != 3 or output.shape[:2] != ids.shape:
        raise ModelError(
            f"expected a layer that puts out [{', '.join(map(str, ids.shape))}, D], got "
            f"{list(output.shape)}; choose a whole block of the model"
        )
    return output[kept.to(output.device)]
