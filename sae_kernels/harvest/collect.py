"""Harvesting: runs a model on documents and stores the activations of its layers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sae_kernels._version import __version__
from sae_kernels.config.row_filter import DEFAULT_FILTER, RowFilter
from sae_kernels.data.shard_index import PROGRESS
from sae_kernels.data.shard_writer import ShardWriter, overflow_remedy
from sae_kernels.errors import DataError, NonFiniteError
from sae_kernels.harvest.cursor import weights_digest
from sae_kernels.harvest.limits import check_options
from sae_kernels.harvest.norms import NormBound, read_bounds
from sae_kernels.harvest.progress import HarvestProgress, begun, finished_rows
from sae_kernels.harvest.rows import LayerRows
from sae_kernels.harvest.text_windows import TextWindows
from sae_kernels.io.files import is_plain_name, remove_stale
from sae_kernels.io.lock import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sae_kernels.harvest.chunks import Chunk

# Rows sorted by length together; enough that hardly any padding is computed.
_WINDOW_ROWS = 32768


def harvest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    layer: str | Sequence[str],
    folder: str | Path,
    *,
    batch_size: int = 16,
    context_length: int = 128,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    row_filter: RowFilter = DEFAULT_FILTER,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    rows_per_shard: int = 65536,
    metadata: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Stores the output of one or several layers for every token of the documents.

    Documents longer than `context_length` are cut into chunks that the model sees one by one. Rows
    are stored in the order of the text, with their token and document number, so a row's context
    is its neighbours of the same document. Padding is never stored. Memory does not grow with the
    number of documents, which may be an endless generator.

    A harvest that ends before its time, in whatever way, leaves its finished shards and a record
    of where it stands. With ``resume=True`` the same call goes on from there to the bytes that it
    would have written without the stop; the text up to there is tokenized again, and the model
    runs on one window of it at most.

    Args:
        model: put in evaluation mode; it stays on its devices.
        tokenizer: a fast tokenizer.
        documents: the texts; when resuming again from the first one on.
        layer: dotted path of a module whose output, or its first element, is [batch, length, D].
            Of several layers, in one pass of the model, each gets a folder of its name in
            ``folder``, and their rows are of the same tokens.
        folder: written as `ShardWriter` does.
        batch_size: chunks of full length in a forward pass; more if they are shorter.
        context_length: tokens in a chunk, special tokens included.
        max_tokens: stop after this many rows; those of enormous norm count, although they are left
            out.
        dtype: stored dtype: float32, bfloat16 or float16.
        autocast: run the model in this dtype, such as bfloat16 on hardware that has it.
        row_filter: which rows are left out; by default those of special tokens, and those whose
            norm is more than 10 times the median norm of the first window, of 32768 rows or
            ``rows_per_shard`` if those are fewer. Each layer has its bound; a row above one is left
            out in all. Bound and count are in the index.
        on_nonfinite: at a row that holds NaN or infinity in ``dtype``, in any of the layers: stop
            with an error, or skip the row in all of them and count it in the index.
        rows_per_shard: see `ShardWriter`.
        metadata: stored besides the model, layer and options.
        resume: go on with an unfinished harvest in the folder, if there is one; a finished one is
            left as it is. ``on_nonfinite`` and ``metadata`` may differ from before.
        overwrite: replace what is in the folder.
        progress: called with the number of new rows, as `tqdm.update` expects.

    Returns:
        The number of rows stored in the folder of each layer.

    Raises:
        ModelError: an unknown layer, one with another output, or whatever else the model or its
            tokenizer cannot do (:mod:`sae_kernels.harvest.limits`).
        DataError: the folder is in use, holds a data set or an unfinished harvest already, or one
            of other settings or text; a finished shard of it has changed.
        NonFiniteError: a layer's output is not finite, or not in ``dtype``.
        ValueError, TypeError: an option out of range, documents that are not strings or empty.
    """
    if isinstance(documents, str):
        raise TypeError("expected an iterable of documents, got one string; put it in a list")
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"on_nonfinite: expected stop or skip, got {on_nonfinite!r}")
    check_options(model, tokenizer, batch_size, context_length, max_tokens, row_filter)
    layers = (layer,) if isinstance(layer, str) else tuple(layer)
    layer_rows = LayerRows(model, tokenizer, layers, batch_size, context_length, autocast)
    folder = Path(folder)
    folders = {layer: folder} if isinstance(layer, str) else _folders(folder, layers)
    settings = {
        "model_dtype": _name(model.dtype),
        "device": layer_rows.device.type,
        "weights": weights_digest(model),
        "context_length": context_length,
        **row_filter.to_json(),
        "batch_size": batch_size,
        "window_rows": max(min(_WINDOW_ROWS, rows_per_shard), context_length),
        "max_tokens": max_tokens,
        "autocast": autocast and _name(autocast),
        "dtype": _name(dtype),
        "rows_per_shard": rows_per_shard,
    }
    text = TextWindows(
        tokenizer,
        lambda: iter(documents),
        context_length=context_length,
        rows=settings["window_rows"],
        row_filter=row_filter,
        max_tokens=max_tokens,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        remove_stale(folder, of_anyone=True)  # the lock says that nobody else writes here
        done = finished_rows(folders, settings) if resume and not overwrite else None
        if done is None:
            start = begun(folder, layers, settings, resume=resume, overwrite=overwrite)
            with ExitStack() as stack:
                writers = [
                    stack.enter_context(
                        ShardWriter(
                            path,
                            width,
                            dtype=dtype,
                            rows_per_shard=rows_per_shard,
                            metadata={
                                "layer": name,
                                **_origin(model),
                                **(metadata or {}),
                                **settings,
                            },
                            overwrite=overwrite or (folder / PROGRESS).exists(),
                            finished=shards,
                        )
                    )
                    for (name, path), width, shards in zip(
                        folders.items(), layer_rows.widths, start.shards, strict=True
                    )
                ]
                norms = NormBound(row_filter.max_norm_multiple, layer_rows.widths)
                run = _Harvest(layer_rows, writers, folder, norms, on_nonfinite == "skip")
                done = run(text, start, progress or (lambda _: None))
        (folder / PROGRESS).unlink(missing_ok=True)
    return done


class _Harvest:
    """Writes the windows of a text from a recorded place on.

    Args:
        layer_rows: gives a window's rows, the layers side by side.
        writers: one a layer.
        folder: of the record.
        norms: says which finite rows are kept.
        skip: leave rows out that are not finite.
    """

    def __init__(
        self,
        layer_rows: LayerRows,
        writers: Sequence[ShardWriter],
        folder: Path,
        norms: NormBound,
        skip: bool,
    ) -> None:
        self._layer_rows, self._writers = layer_rows, writers
        self._folder, self._norms, self._skip = folder, norms, skip

    def __call__(
        self, text: TextWindows, at: HarvestProgress, progress: Callable[[int], object]
    ) -> int:
        """Writes the text from a record on; returns the rows that are stored in the end."""
        window, first = text.window(at.window), self._writers[0]
        if at.stored and (window is None or text.digest != at.text):
            raise DataError(
                f"{self._folder}: expected the text that its unfinished harvest read, this one "
                f"differs within its first {at.window + 1} windows; give the same documents in the "
                "same order and the same tokenizer, or replace it, overwrite=True (--overwrite)"
            )
        if at.seen:
            progress(at.seen)
        begin = at
        self._norms.bounds = read_bounds(at.max_norm, len(self._writers))
        held = torch.empty(at.settings["window_rows"], self._layer_rows.d_in, dtype=first.dtype)
        while window is not None:
            rows = self._layer_rows.fill(window, held, progress)
            finished, seen = len(first.shards), len(rows)
            columns = self._finite(window, rows)
            finite, kept = len(columns[0]), self._norms.kept(columns[0])
            rows, tokens, documents = (column[kept] for column in columns)
            new = slice(at.offset, None)
            parts = rows.split(self._layer_rows.widths, dim=1)
            for writer, part in zip(self._writers, parts, strict=True):
                writer.write(part[new], tokens[new], documents[new])
            if len(first.shards) > finished:
                shards = tuple(tuple(writer.shards) for writer in self._writers)
                offset = len(rows) - first.pending
                bounds = self._norms.recorded()
                here = replace(at, offset=offset, text=text.digest, shards=shards, max_norm=bounds)
                here.write(self._folder)
            at = replace(
                at,
                window=at.window + 1,
                offset=0,
                seen=at.seen + seen,
                nonfinite=at.nonfinite + seen - finite,
                above=at.above + finite - len(rows),
            )
            window = text.window(at.window)
        if not at.seen:
            raise ValueError("expected documents with at least one token, got none")
        if at.nonfinite == at.seen:
            raise NonFiniteError(
                f"expected finite activations, none of the {at.seen} rows is finite in "
                f"{first.dtype}; look for NaN in the model"
            )
        if not (self._folder / PROGRESS).exists():
            begin.write(self._folder)  # of several indexes some may be there and others not yet
        for layer, writer in enumerate(self._writers):
            writer.metadata["nonfinite_rows"] = at.nonfinite
            writer.metadata |= self._norms.index_facts(layer, at.above)
        return at.seen - at.nonfinite - at.above

    def _finite(self, window: list[Chunk], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A window's finite rows with their tokens and documents.

        Raises:
            NonFiniteError: rows that are not, and are not to be left out.
        """
        tokens = torch.cat([chunk.ids[chunk.kept] for chunk in window])
        counts = torch.tensor([chunk.rows for chunk in window])
        documents = torch.tensor([chunk.document for chunk in window]).repeat_interleave(counts)
        # The extremes show NaN and infinity at a fraction of isfinite's cost.
        if torch.stack(rows.aminmax()).isfinite().all():
            return rows, tokens, documents
        finite = torch.cat([some.isfinite().all(1) for some in rows.split(4096)])
        if not self._skip:
            row = int(finite.logical_not().nonzero()[0])
            number = int((counts.cumsum(0) <= row).sum())
            raise self._error(window[number], row - int(counts[:number].sum()), rows[row])
        return rows[finite], tokens[finite], documents[finite]

    def _error(self, chunk: Chunk, place: int, row: Tensor) -> NonFiniteError:
        """The error for a row, at a place among a chunk's rows, that is not finite as stored."""
        # Run once more in the widest dtype: is it the model that is not finite, or what is stored?
        wide = torch.empty(chunk.rows, self._layer_rows.d_in)
        computed = self._layer_rows.fill([chunk], wide)[place]
        bad = int(row.isfinite().logical_not().nonzero()[0])
        overflows = bool(computed.isfinite().all())
        ends = torch.tensor(self._layer_rows.widths).cumsum(0)
        layer = self._layer_rows.layers[int((ends <= bad).sum())]
        remedy = overflow_remedy(row.dtype) if overflows else "look for NaN in the model"
        return NonFiniteError(
            f"{layer}, document {chunk.document}: expected activations that are finite in "
            f"{row.dtype}, got {float(computed[bad])}; {remedy}, or leave such rows out with "
            "on_nonfinite='skip' (--on-nonfinite skip). Finished shards are kept: resume=True "
            "(--resume) goes on after them"
        )


def _folders(folder: Path, layers: Sequence[str]) -> dict[str, Path]:
    """A folder for each of several layers."""
    for layer in layers:
        if not is_plain_name(layer):
            raise ValueError(f"layer: expected names that a folder can have, got {layer!r}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layer: expected layers that differ, got {', '.join(layers)}")
    return {layer: folder / layer for layer in layers}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _origin(model: PreTrainedModel) -> dict[str, Any]:
    """Where activations come from, for the index: the model's name and commit, and versions."""
    packages = ("torch", "transformers", "tokenizers")
    return {
        "model": str(getattr(model.config, "_name_or_path", "")),
        "revision": getattr(model.config, "_commit_hash", None),
        "versions": {
            "sae_kernels": __version__,
            **{name: installed.version(name) for name in packages},
        },
    }
