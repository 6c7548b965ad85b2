"""Documents from text files, or from the documentation that Python ships."""

from __future__ import annotations

import ast
import codecs
import gc
import hashlib
import io
import json
import os
import sysconfig
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_SUFFIXES = (".txt", ".jsonl")
# By byte order mark. That of UTF-32 starts as that of UTF-16 does.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DOS_END = "\x1a"  # ^Z
_MIN_CHARACTERS = 200


def python_corpus() -> list[str]:
    """English documents without a download: Python's language reference and docstrings.

    First the topics of `pydoc`, then the docstrings of the standard library in the order of its
    files; short docstrings of a module are joined to at least 200 characters (a shorter rest is
    left out). Sources are parsed, not imported. The same Python version gives the same list.
    """
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    with _uncollected():
        for folder, below, files in os.walk(sysconfig.get_path("stdlib")):
            below[:] = sorted(set(below) - _SKIPPED)
            for name in sorted(files):
                if name.endswith(".py"):
                    documents += _docstrings(Path(folder, name))
    return documents


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles, of which syntax trees have none: half of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _docstrings(path: Path) -> list[str]:
    documents: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return documents
    pieces: list[str] = []
    for node in _definitions(module):
        pieces.append(ast.get_docstring(node) or "")
        text = "\n\n".join(filter(None, pieces))
        if len(text) >= _MIN_CHARACTERS:
            documents.append(text)
            pieces = []
    return documents


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST) -> Iterator[_Documented]:
    """The node and all definitions inside it, in source order."""
    if isinstance(node, _Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _definitions(child)


def read_documents(paths: Iterable[str | Path]) -> Iterator[str]:
    """Reads documents from text files, one file in memory at a time.

    A .jsonl file holds one document per line, under the key "text"; any other file is one document.
    A folder stands for its .txt and .jsonl files, at any depth, sorted by name; links to folders in
    it are not followed. Blank documents are left out.

    Text is UTF-8, or what a byte order mark says: UTF-8, UTF-16 or UTF-32 of either order. The
    mark and a last ^Z, the end of a DOS file, are no text. Lines end with LF, CRLF or CR, all of
    which a document has as LF; no other character ends one, such as NEL or U+2028.

    Raises:
        DataError: at once for a missing path or a folder without such files; while iterating for
            bytes that are no such text, or a line that is not such a JSON object.
    """
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if not path.exists():
            raise DataError(f"{path} does not exist; name a text file or a folder of them")
        found = sorted(filter(_is_text, path.rglob("*"))) if path.is_dir() else []
        if path.is_dir() and not found:
            raise DataError(f"{path} holds no .txt or .jsonl file; name the files one by one")
        files += found or [path]
    return (text for path in files for text in _read(path) if text.strip())


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.is_dir()


def _read(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            encoding = _encoding(file.peek(4))
            lines = io.TextIOWrapper(file, encoding)  # turns every end of a line into LF
            try:
                yield from _documents(lines, path)
            except UnicodeDecodeError as error:
                raise DataError(_undecodable(path, file, encoding, error)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from None


def _encoding(start: bytes) -> str:
    """The encoding that a byte order mark names, without one UTF-8."""
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")


def _documents(lines: io.TextIOWrapper, path: Path) -> Iterator[str]:
    if path.suffix.lower() != ".jsonl":
        yield _checked(lines.read().removesuffix(_DOS_END), str(path))
        return
    for number, line in enumerate(lines, 1):
        # Files with a mark that were joined have it in the middle as well.
        line = line.removeprefix("\ufeff").removesuffix(_DOS_END)
        if line.strip():
            where = f"{path}:{number}"
            yield _text_of(_checked(line, where), where)


def _checked(text: str, where: str) -> str:
    place = text.find("\0")
    if place >= 0:
        raise DataError(
            f"{where}: expected text, got a NUL character after {place} others; UTF-16 without a "
            "byte order mark has them: convert it with `iconv -f utf-16le -t utf-8`"
        )
    return text


def _undecodable(path: Path, file: BinaryIO, encoding: str, error: UnicodeDecodeError) -> str:
    # What was decoded last ends where reading stands.
    place = f" at byte {file.tell() - len(error.object) + error.start}" if file.seekable() else ""
    got = f"{error.object[error.start : error.start + 1].hex() or 'nothing'}{place}"
    said, remedy = "", "a file of Windows with `iconv -f windows-1252 -t utf-8`"
    if not encoding.startswith("utf-8"):
        said, remedy = " as its byte order mark says", f"`iconv -c -f {encoding} -t utf-8` drops it"
    kind = encoding.removesuffix("-sig").upper()
    return f"{path}: expected {kind} text{said}, got the byte {got}; convert it, {remedy}"


def _text_of(line: str, where: str) -> str:
    many = line.lstrip().startswith("[")
    convert = f"; `jq -c '{'.[]' if many else '.'}'` writes one a line"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        goes_on = isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip())
        raise DataError(
            f"{where}: expected one JSON object a line ({error}){convert if goes_on else ''}"
        ) from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f'{where}: expected an object with a string under "text", got {line:.60}'
            f"{convert if many else ''}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected characters, got {text[error.start]!a}, half of a surrogate pair; "
            "mend the line or leave it out"
        ) from None
    return text


def split_documents(
    documents: Iterable[str], held_out: float = 0.1, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Splits documents into (train, held out), shuffled by `seed` and without duplicates.

    Documents that differ only in white space are duplicates. The side of a document depends on its
    text and `seed` alone, so it does not change when documents are added; only if a side would be
    empty does a document move over. `held_out` is the expected share.

    Raises:
        ValueError: a share outside [0, 1), or fewer than two documents to split.

    >>> train, held_out = split_documents(["a b", "a  b", "c", "d"], held_out=0.3)
    >>> sorted(train + held_out)
    ['a b', 'c', 'd']
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"expected held_out at least 0 and below 1, got {held_out}")
    ranked: dict[str, str] = {}
    for document in documents:
        ranked.setdefault(_rank(document, seed), document)
    ranks = sorted(ranked)
    share = 0
    if held_out:
        if len(ranks) < 2:
            raise ValueError(
                f"expected at least two different documents to split, got {len(ranks)}"
            )
        share = sum(int(rank, 16) < held_out * 2.0**128 for rank in ranks)
        share = min(max(share, 1), len(ranks) - 1)
    ordered = [ranked[rank] for rank in ranks]
    return ordered[share:], ordered[:share]


def _rank(document: str, seed: int) -> str:
    text = f"{seed}\n{' '.join(document.split())}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
