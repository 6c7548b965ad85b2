"""Documents from Hugging Face datasets, on the hub or in a folder."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import ModuleType

# Builders of tables; others decode media or formats that may hold more than text.
_TABLES = ("parquet", "json", "csv", "text", "arrow")
_SAVED = ("dataset_dict.json", "state.json")  # written by save_to_disk


def dataset_documents(
    name_or_folder: str | Path,
    *,
    subset: str | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = True,
    revision: str | None = None,
) -> DatasetDocuments:
    """The texts of a dataset's column, as an iterable that can be iterated repeatedly.

    A folder holds parquet, json, jsonl, csv, arrow or txt files, or is what `Dataset.save_to_disk`
    or `DatasetDict.save_to_disk` wrote; it is read offline. Any other name is loaded from the
    Hugging Face hub. Blank and missing texts are left out. No code of a repository runs:
    `datasets` 4 and later support none, and older versions are refused.

    Args:
        name_or_folder: a folder, or a name on the hub.
        subset: the name of a configuration, where a dataset has several.
        split: the split; also slices such as ``"train[:10%]"`` with ``streaming=False``.
        column: the column of text.
        streaming: read without writing to disk; otherwise `datasets` first writes its cache,
            which is faster from the second pass on. Data of `save_to_disk` are memory-mapped.
        revision: a commit, tag or branch of a dataset on the hub. Name a commit to be able to
            resume a run exactly.

    Raises:
        DataError: nothing found or nothing that loads under these rules, an unknown subset, split
            or column (the message lists those that exist), a column that holds no text.
        ImportError: `datasets` is not installed, or is older than 4.
    """
    library = _library()
    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if not folder.exists() and (isinstance(name_or_folder, Path) or name[:1] in "./~\\"):
        raise DataError(f"expected a folder with a dataset at {name}, nothing is there")
    if folder.is_file() or name in _TABLES:
        kind = "a file" if folder.is_file() else "a kind of file"
        raise DataError(f"expected a folder or a name on the hub, {name} is {kind}")
    with _quiet(library), _reading(library, f"{name}, split {split!r}"):
        if folder.is_dir() and any((folder / file).is_file() for file in _SAVED):
            rows = _saved(library, folder, split)
        else:
            source = str(folder) if folder.exists() else name
            rows = _built(library, source, subset, split, streaming, revision)
        columns = rows.column_names or list(next(iter(rows), {}))
        if column not in columns:
            there = ", ".join(columns) or "none"
            raise DataError(
                f"{name}: expected a column {column!r} with text, there are {there}; name one"
            )
        documents = DatasetDocuments(rows.select_columns([column]), column, name)
        next(iter(documents), None)
    return documents


class DatasetDocuments:
    """The texts of :func:`dataset_documents`; every ``iter`` starts at the first one.

    Raises:
        DataError: while iterating, a text that is not a string, or rows that cannot be read.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], column: str, name: str) -> None:
        self._rows, self._column, self._name = rows, column, name

    def __iter__(self) -> Iterator[str]:
        with _reading(_library(), self._name):
            for number, row in enumerate(self._rows, 1):
                text = row[self._column]
                if text is not None and not isinstance(text, str):
                    raise DataError(
                        f"{self._name}, row {number}: expected a string in column "
                        f"{self._column!r}, got {type(text).__name__}; name a column of text"
                    )
                if text and text.strip():
                    yield text


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'text from Hugging Face datasets needs them; pip install "sae-kernels[datasets]"'
        ) from error
    library: ModuleType = datasets
    if int(library.__version__.split(".")[0]) < 4:
        raise ImportError(
            f"expected datasets 4 or later, got {library.__version__}, which may run a "
            'repository\'s script; pip install "sae-kernels[datasets]"'
        )
    return library


def _saved(library: ModuleType, folder: Path, split: str) -> Any:
    """The rows of a folder written by save_to_disk."""
    saved = library.load_from_disk(str(folder))
    if isinstance(saved, library.DatasetDict):
        if split not in saved:
            raise DataError(f"{folder}: expected a split {split!r}, there are {', '.join(saved)}")
        saved = saved[split]
    elif saved.split is not None and str(saved.split) != split:
        raise DataError(f"{folder}: expected the split {split!r}, it holds {str(saved.split)!r}")
    return saved.with_format(None)


def _built(
    library: ModuleType,
    source: str,
    subset: str | None,
    split: str,
    streaming: bool,
    revision: str | None,
) -> Any:
    """The rows of a folder of table files, or of a dataset on the hub."""
    kind = library.load_dataset_builder(source, subset, revision=revision).info.builder_name
    if kind not in _TABLES:
        raise DataError(
            f"{source}: expected a dataset of {', '.join(_TABLES)} files, got one of kind {kind!r}"
        )
    options: dict[str, Any] = {"split": split, "streaming": streaming, "revision": revision}
    return library.load_dataset(source, subset, **options)


@contextmanager
def _reading(library: ModuleType, name: str) -> Iterator[None]:
    """Turns the library's errors into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        StopIteration,
        library.exceptions.DatasetsError,
    ) as error:
        reason = " ".join(str(error).split()) or "it has no rows"
        raise DataError(f"{name} cannot be read as a dataset: {reason:.300}") from error


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """Hides the library's progress bars and log messages."""
    shown, verbosity = not library.are_progress_bars_disabled(), library.logging.get_verbosity()
    library.disable_progress_bars()
    library.logging.set_verbosity(library.logging.CRITICAL)
    try:
        yield
    finally:
        library.logging.set_verbosity(verbosity)
        if shown:
            library.enable_progress_bars()
