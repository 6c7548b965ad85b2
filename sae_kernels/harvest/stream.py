"""Streaming activations: batches straight from a model, without storing them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sae_kernels.config.row_filter import DEFAULT_FILTER, RowFilter
from sae_kernels.data.windows import permutation
from sae_kernels.harvest.cursor import Cursor, checked_cursor, weights_digest
from sae_kernels.harvest.limits import check_options
from sae_kernels.harvest.norms import NormBound, read_bounds
from sae_kernels.harvest.rows import LayerRows
from sae_kernels.harvest.spread import some_rows, spread
from sae_kernels.harvest.text_windows import TextWindows, reopenable
from sae_kernels.harvest.window_rows import WindowRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sae_kernels.distributed.team import Team
    from sae_kernels.harvest.chunks import Chunk

_Piece = TypeVar("_Piece")
_AHEAD = 1 << 22  # rows that a sample is spread over: text is tokenized for it that far


class LiveBatches:
    """Shuffled batches [B, D] of a layer's output; the model runs as batches are requested.

    The text is cut into windows of about ``window_rows`` rows, and the rows of a window are
    permuted. The order is a pure function of the arguments, the epoch and the window: a stream
    resumed from a saved state yields what the first one would have, bit for bit on a CPU. Resuming
    tokenizes the earlier text again, but runs the model on the current window alone. Memory holds
    the model, one window, a batch of the model and a batch of the stream.

    Rows of enormous norm are left out by ``row_filter.max_norm_multiple`` times the median norm of
    the first window of text, a bound for each layer that the saved state has, too.

    An epoch is one pass over the text, without the last rows that do not fill a batch. Documents
    are read in the same order every time, so similar ones should not be adjacent:
    :func:`~sae_kernels.harvest.split_documents` shuffles them.

    Args:
        model: put in evaluation mode; it stays on its device.
        tokenizer: a fast tokenizer.
        documents: a list or another iterable that can be iterated repeatedly, such as
            :func:`~sae_kernels.harvest.dataset_documents`; or a function that returns a new
            iterator of the same documents at each call.
        layer: dotted path of a module whose output, or its first element, is [batch, length, D].
            Rows of several layers are concatenated (a crosscoder's layers, a transcoder's input
            and target), and D is the sum of their widths.
        batch_size: rows a batch.
        seed: another seed is another order.
        window_rows: rows that are shuffled together and held in memory.
        model_batch_size: chunks of full length in a forward pass; more if they are shorter.
        context_length: tokens in a chunk, special tokens included.
        dtype: of the batches.
        autocast: run the model in this dtype, such as bfloat16 on hardware that has it.
        row_filter: which rows are left out; by default those of special tokens, and those whose
            norm is more than 10 times the median.
        epochs: passes over the text; None never ends.
        max_tokens: rows in a pass, for endless text; those of enormous norm count, although they
            are left out.
        device: device of the window and the batches; default: the model's.

    Attributes:
        d_in: D, the width of a row.
        layers: as given.
        widths: the width of each layer.
        position: batches yielded so far.
        left_out: rows left out so far because of their norm.
        metadata: the model, the layers and the context's length, as a harvested folder has them.

    Raises:
        ModelError: an unknown layer, one with another output, or whatever else the model or its
            tokenizer cannot do (:mod:`sae_kernels.harvest.limits`).
        NonFiniteError: while iterating, if the layer's output holds NaN or infinity.
        TypeError: documents that can be iterated only once.
        ValueError: an option out of range; while iterating, a text without tokens or with fewer
            than one batch.

    Example:
        >>> from sae_kernels.harvest import load_model, minilm_folder
        >>> model, tokenizer = load_model(minilm_folder())
        >>> text = ["The cat sat on the mat.", "A dog ran far away."]
        >>> batches = LiveBatches(model, tokenizer, text, "encoder.layer.4", 8, epochs=1)
        >>> [list(x.shape) for x in batches]
        [[8, 384]]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Iterable[str] | Callable[[], Iterable[str]],
        layer: str | Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        window_rows: int = 65536,
        model_batch_size: int = 16,
        context_length: int = 128,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        row_filter: RowFilter = DEFAULT_FILTER,
        epochs: int | None = None,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_options(model, tokenizer, model_batch_size, context_length, max_tokens, row_filter)
        for name, given, least in (
            ("batch_size", batch_size, 1),
            ("epochs", 1 if epochs is None else epochs, 1),
            ("window_rows", window_rows, context_length),
        ):
            if given < least:
                raise ValueError(f"expected {name} of at least {least}, got {given}")
        if not dtype.is_floating_point:
            raise ValueError(f"expected a floating point dtype, got {dtype}")
        self.layers = layers = (layer,) if isinstance(layer, str) else tuple(layer)
        self._read = model, tokenizer, documents
        self._options: dict[str, Any] = {
            "seed": seed,
            "window_rows": window_rows,
            "model_batch_size": model_batch_size,
            "context_length": context_length,
            "dtype": dtype,
            "autocast": autocast,
            "row_filter": row_filter,
            "epochs": epochs,
            "max_tokens": max_tokens,
            "device": device,
        }
        self._text = TextWindows(
            tokenizer,
            reopenable(documents),
            context_length=context_length,
            rows=window_rows,
            row_filter=row_filter,
            max_tokens=max_tokens,
        )
        self._layer_rows = LayerRows(
            model, tokenizer, layers, model_batch_size, context_length, autocast
        )
        self.widths, self.d_in = self._layer_rows.widths, self._layer_rows.d_in
        self.dtype, self.batch_size = dtype, batch_size
        self.device = torch.device(device) if device is not None else self._layer_rows.device
        self.seed, self.epochs, self.position, self.left_out = seed, epochs, 0, 0
        self._window_rows = window_rows
        self._row_filter = row_filter
        self._norms = NormBound(row_filter.max_norm_multiple, self.widths)
        self._settings = {
            "seed": seed,
            "batch_size": batch_size,
            "window_rows": window_rows,
            "model_batch_size": model_batch_size,
            "context_length": context_length,
            **row_filter.to_json(),
            "max_tokens": max_tokens,
            "layer": list(layers),
            "d_in": self.d_in,
            "dtype": str(dtype),
            "autocast": autocast and str(autocast),
            "weights": weights_digest(model),
        }
        self.metadata = {
            "model": str(getattr(model.config, "_name_or_path", "")),
            "layer": list(layers),
            "context_length": context_length,
        }
        self._team: Team | None = None
        self._ahead = False
        self._window = WindowRows(self._layer_rows, dtype, self.device)
        self._cursor, self._digest = Cursor(), ""
        self._counted: tuple[int, int] | None = None  # window whose rows left_out has
        self.close()

    @property
    def facts(self) -> dict[str, Any]:
        """Which rows are left out, as JSON values, for the metadata of an SAE trained on this."""
        return self._norms.facts(self._row_filter)

    def joined(self, others: Sequence[LiveBatches]) -> LiveBatches:
        """A stream of the layers of this one and of others, each once, in one pass of the model.

        Its batches hold the rows of the same tokens as the streams' own, in the same order.

        Raises:
            ValueError: streams of another model, tokenizer or text, or with other options.
        """
        for other in others:
            same = all(one is two for one, two in zip(self._read, other._read, strict=True))
            if not same or (self.batch_size, self._options) != (other.batch_size, other._options):
                raise ValueError(
                    "source: expected streams that differ in their layer alone, got different "
                    f"models, texts or options for {', '.join(self.layers)} and "
                    f"{', '.join(other.layers)}; make them with the same objects"
                )
        layers = dict.fromkeys(layer for each in (self, *others) for layer in each.layers)
        return LiveBatches(*self._read, list(layers), self.batch_size, **self._options)

    @contextmanager
    def spread_over(self, team: Team, *, ahead: bool = False) -> Iterator[None]:
        """Several processes give the same batches together in the block, each a part of the work.

        Each runs the model on some of its batches of a window, and holds their rows alone; a batch
        is gathered from all. Order, rows and saved states are those of one process, so that any
        number of processes can go on from another. All of them tokenize all of the text.

        Args:
            team: the processes, all of which ask for the same batches and samples.
            ahead: run the model on the next window of an epoch while one is handed out, in a
                thread. Memory then holds two windows.

        Raises:
            ValueError: while iterating, if the processes read different texts.
            RankError: while iterating, if the model failed in another process.
        """
        self._team, self._ahead = team, ahead
        self.close()
        try:
            yield
        finally:
            self._team, self._ahead = None, False
            self.close()

    def close(self) -> None:
        """Frees the window and the text; the next batch would make them again."""
        self._text.close()
        self._window.close()
        self._window = WindowRows(self._layer_rows, self.dtype, self.device, self._team)
        # Number of the window that is at hand, and its rows that are kept.
        self._held: tuple[int, Tensor] | None = None
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        pieces = self._pieces(lambda window, numbers: window.gathered(window.own, numbers))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def part(self) -> tuple[Tensor, Tensor] | None:
        """The next batch without gathering it: this process's rows [n, D], and who has each row.

        In a block of :meth:`spread_over`, whose processes all call it in place of ``next``; nothing
        is gathered.

        Returns:
            The rows in the order of the batch, and the rank of each of the batch's, int64 [B]. None
            after the last batch.
        """
        try:
            rows, holders = zip(*self._pieces(WindowRows.part), strict=True)
        except StopIteration:
            return None
        return torch.cat(rows), torch.cat(holders)

    def _pieces(self, read: Callable[[WindowRows, Tensor], _Piece]) -> list[_Piece]:
        """Reads the next batch from one window after the other, by the numbers of its rows."""
        pieces: list[_Piece] = []
        cursor, missing = self._cursor, self.batch_size
        while missing:
            if self.epochs is not None and cursor.epoch >= self.epochs:
                self._cursor = cursor
                raise StopIteration
            numbers = self._take(cursor, missing)
            if numbers is None:
                if self._cursor <= Cursor(cursor.epoch):
                    raise ValueError(self._too_few(self.batch_size - missing))
                cursor, pieces, missing = Cursor(cursor.epoch + 1), [], self.batch_size
                continue
            pieces.append(read(self._window, numbers))
            missing -= len(numbers)
            if missing:
                cursor = Cursor(cursor.epoch, cursor.window + 1)
            else:
                cursor = cursor._replace(offset=cursor.offset + len(numbers))
        self._cursor, self._digest = cursor, self._text.digest
        self.position += 1
        return pieces

    def sample(self, n: int) -> Tensor:
        """About n rows drawn at random from the whole text, or all there are; moves nothing.

        The text is tokenized for it, but not more than 4,194,304 rows of it: a longer text is
        sampled up to there. The model runs on chunks evenly spread over it, of at most 2 n rows,
        besides the first window, which fixes the bound of the norms. No more than n of their rows
        come, less those left out because of their norm. The stream does not advance; call it before
        the first batch, which finds the first window ready.

        Raises:
            NonFiniteError: the layer's output holds NaN or infinity.
            ValueError: n below 1, or a text without tokens.
        """
        if n < 1:
            raise ValueError(f"expected n of at least 1, got {n}")
        self._fix_bounds()
        ahead = self._text.chunks(_AHEAD)
        chunks = some_rows(spread(ahead, lambda chunk: chunk.rows, 2 * n, self.seed), n, self.seed)
        if not chunks:
            raise ValueError(self._too_few(0))
        some = WindowRows(self._layer_rows, self.dtype, self.device, self._team)
        some.fill(chunks, "sample")
        kept = self._norms.kept(some.own, some.gathered)
        return some.gathered(some.own, kept.nonzero().flatten())

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and all settings that the order depends on, as JSON values."""
        return {
            "position": self.position,
            **self._cursor._asdict(),
            "text": self._digest,
            "max_norm": self._norms.recorded(),
            "left_out": self.left_out,
            "settings": dict(self._settings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where a saved stream stood, which must have had the same settings.

        The text up to there is tokenized again and compared with the saved digest.

        Raises:
            ValueError: the settings, the model's weights or the text differ (the message says
                which), or the state is not one of LiveBatches.
        """
        cursor, position = checked_cursor(state, self._settings)
        bounds = read_bounds(state.get("max_norm"), len(self.widths))
        if cursor.offset:
            window = self._text.window(cursor.window)
            rows = sum(chunk.rows for chunk in window or ())
            if cursor.offset > rows or self._text.digest != state["text"]:
                raise ValueError(
                    "documents: expected the text that the saved stream read, this one differs "
                    f"within its first {cursor.window + 1} windows; give the same documents in the "
                    "same order, and the same tokenizer"
                )
        self._norms.bounds = bounds or self._norms.bounds
        self._cursor, self._digest, self.position = cursor, state["text"], position
        self.left_out = int(state["left_out"])
        self._counted = cursor[:2] if cursor.offset else None

    def _take(self, cursor: Cursor, most: int) -> Tensor | None:
        """Numbers of up to `most` rows from a cursor on, in its window; None after the last."""
        self._fix_bounds()
        chunks = self._text.window(cursor.window)
        if chunks is None:
            return None
        kept = self._kept_of(cursor.window, chunks)
        if self._ahead and not self._window.runs_ahead:
            following = self._text.ahead(cursor.window + 1)
            if following is not None:
                self._window.run_ahead(following)
        if self._counted is None or self._counted < cursor[:2]:
            self._counted = cursor[:2]
            self.left_out += sum(chunk.rows for chunk in chunks) - len(kept)
        order = self._permutation(kept, cursor)
        return kept[order[cursor.offset : cursor.offset + most]]

    def _fix_bounds(self) -> None:
        """Runs the model on the first window if no window has fixed the bounds of the norms yet."""
        if self._norms.waits and (chunks := self._text.window(0)) is not None:
            self._kept_of(0, chunks)

    def _kept_of(self, number: int, chunks: list[Chunk]) -> Tensor:
        """The numbers of the rows of a window that are kept; they are at hand from now on."""
        if self._held is None or self._held[0] != number:
            self._held = None
            window, team = self._window, self._team
            if team is None:
                window.fill(chunks, f"window {number}", least=self._window_rows)
            else:
                team.expect_same({f"text up to window {number}": self._text.digest})
                window.fill(chunks, f"window {number}")
            kept = self._norms.kept(window.own, window.gathered).nonzero().flatten()
            self._held = (number, kept if team is None else kept.cpu())
        return self._held[1]

    def _permutation(self, kept: Tensor, cursor: Cursor) -> Tensor:
        key = cursor[:2]
        if self._order is None or self._order[0] != key:
            self._order = (key, permutation(len(kept), self.seed, *key).to(kept.device))
        return self._order[1]

    def _too_few(self, rows: int) -> str:
        if not rows:
            return "expected documents with at least one token, got none"
        return (
            f"expected at least one batch of {self.batch_size} rows, got {rows} rows in all; use a "
            "smaller batch or more text"
        )
