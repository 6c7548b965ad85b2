"""Numbered windows of chunks over documents that can be read repeatedly."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sae_kernels.harvest.chunks import cut_documents, limit_rows, windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PreTrainedTokenizerBase

    from sae_kernels.config.row_filter import RowFilter
    from sae_kernels.harvest.chunks import Chunk


def reopenable(
    documents: Iterable[str] | Callable[[], Iterable[str]],
) -> Callable[[], Iterator[str]]:
    """A function that returns a new iterator of the documents at each call.

    Raises:
        TypeError: one string, or an iterator, which can be read only once.
    """
    if isinstance(documents, str):
        raise TypeError("expected an iterable of documents, got one string; put it in a list")

    def fresh() -> Iterator[str]:
        return iter(documents() if callable(documents) else documents)

    if fresh() is fresh():
        raise TypeError(
            "documents: expected a list, or a function that gives a fresh iterator at each call, "
            f"got {type(documents).__name__}, which can be gone through once only; resuming and "
            "further epochs start from the first document"
        )
    return fresh


class TextWindows:
    """The windows of a text by number; going forward is cheap, going back by two starts over.

    Only the tokenizer makes windows, so skipping one does not run the model.

    Attributes:
        digest: a hash of the tokens and document numbers up to the last window that `window` gave.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Callable[[], Iterator[str]],
        *,
        context_length: int,
        rows: int,
        row_filter: RowFilter,
        max_tokens: int | None,
    ) -> None:
        self._tokenizer, self._documents = tokenizer, documents
        self._length, self._rows = context_length, rows
        self._row_filter, self._max_tokens = row_filter, max_tokens
        self.close()

    def close(self) -> None:
        """Drops the iterator; the next window opens the text again."""
        self._source: Iterator[list[Chunk]] | None = None
        self._number = -1
        self._hash = hashlib.blake2b(digest_size=16)
        self.digest = self._hash.hexdigest()
        self._recent: dict[int, tuple[list[Chunk] | None, str]] = {}  # the last two

    def window(self, number: int) -> list[Chunk] | None:
        """The chunks of window `number`, or None after the last window."""
        chunks, self.digest = self._read(number)
        return chunks

    def ahead(self, number: int) -> list[Chunk] | None:
        """The chunks of the window after the last one, or None; `digest` stays."""
        return self._read(number)[0]

    def chunks(self, most: int | None = None) -> Iterator[Chunk]:
        """All chunks from the first on, of at most ``most`` rows, apart from the windows."""
        chunks = cut_documents(self._tokenizer, self._documents(), self._length, self._row_filter)
        return limit_rows(limit_rows(chunks, self._max_tokens), most)

    def _read(self, number: int) -> tuple[list[Chunk] | None, str]:
        if self._source is None or (number < self._number and number not in self._recent):
            self.close()
            self._source = windows(self.chunks(), self._rows)
        try:
            while self._number < number and self._advance(self._source):
                pass
        except BaseException:
            self.close()  # an interrupted generator would look exhausted
            raise
        return self._recent[min(number, self._number)]

    def _advance(self, source: Iterator[list[Chunk]]) -> bool:
        """Reads a window more, if there is one."""
        chunks = next(source, None)
        self._number += 1
        for chunk in chunks or ():
            self._hash.update(f"{chunk.document} {len(chunk.ids)} {chunk.rows}".encode())
            self._hash.update(chunk.ids.numpy().tobytes())
        before = self._recent.get(self._number - 1)
        self._recent = {self._number: (chunks, self._hash.hexdigest())}
        if before is not None:
            self._recent[self._number - 1] = before
        return chunks is not None
