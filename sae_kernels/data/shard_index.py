"""index.json, which lists the shards of a folder of activations; validated when it is read."""

from __future__ import annotations

import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sae_kernels.errors import DataError
from sae_kernels.io.files import is_plain_name, json_writer, publish, read_json

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "index.json"
PROGRESS = "progress.json"  # of an unfinished harvest
FORMAT = "sae_kernels.activations"
VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = ("activations", "tokens", "documents")
_MAX_COUNT = 1 << 62  # sums of larger counts may have more digits than Python prints

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One file of the data set: its plain name, rows, size and SHA-256."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of index.json: width, dtype, columns, metadata and shards."""

    d_in: int
    dtype: torch.dtype
    columns: tuple[str, ...]
    metadata: dict[str, Any]
    shards: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        """Writes index.json, which makes `folder` a data set."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "d_in": self.d_in,
            "dtype": str(self.dtype).removeprefix("torch."),
            "count": sum(shard.count for shard in self.shards),
            "columns": self.columns,
            "metadata": self.metadata,
            "shards": [asdict(shard) for shard in self.shards],
        }
        publish(folder / INDEX, json_writer(record))

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Reads and checks index.json, and no other file.

        Raises:
            DataError: the index is missing, damaged, of another format, or contradicts itself.
        """
        path = folder / INDEX
        record = _load(path)
        kind, version = record.get("format"), record.get("version")
        if kind != FORMAT or version != VERSION:
            raise DataError(
                f"{path}: expected {FORMAT} version {VERSION}, got {kind!r:.40} version "
                f"{version!r:.40}; read it with the version of sae_kernels that wrote it"
            )
        dtype = _field(path, record, "dtype", str)
        columns = _field(path, record, "columns", list)
        index = cls(
            d_in=_field(path, record, "d_in", int),
            dtype=DTYPES.get(dtype, torch.int8),
            columns=tuple(name for name in COLUMNS if name in columns),
            metadata=_field(path, record, "metadata", dict),
            shards=tuple(read_shard(path, entry) for entry in _field(path, record, "shards", list)),
        )
        count = _field(path, record, "count", int)
        held = sum(shard.count for shard in index.shards)
        names = {shard.file for shard in index.shards}
        for wrong, what in (
            (dtype not in DTYPES, f"dtype one of {', '.join(DTYPES)}, got {dtype!r:.40}"),
            (index.d_in < 1, f"d_in of at least 1, got {index.d_in}"),
            ("activations" not in columns, "a column activations"),
            (len(index.columns) != len(columns), f"columns among {COLUMNS}, got {columns!r:.80}"),
            (len(names) != len(index.shards), "each shard named once"),
            (count != held, f"the {held} rows of its shards as count, got {count}"),
        ):
            if wrong:
                raise DataError(f"{path}: expected {what}; write the data set again")
        return index


def _load(path: Path) -> dict[str, Any]:
    if not path.is_symlink() and not path.exists():
        raise DataError(f"{path.parent} is not a data set: it has no {INDEX}; {_hint(path.parent)}")
    regular_file_size(path)
    return read_json(path, "the index of a data set")


def _hint(folder: Path) -> str:
    """What to do about a folder without an index."""
    if not folder.exists():
        return "nothing is there"
    if (folder / PROGRESS).exists():
        return "its harvest is unfinished, go on with it by resume=True (--resume)"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
    if inside:
        return f"it holds data sets, name one of them: {', '.join(inside)[:200]}"
    return (
        "write activations that you have into one by sae_kernels.data.ShardWriter (docs/data.md), "
        "and an interrupted one again"
    )


def _field(path: Path, record: dict[str, Any], name: str, kind: type[T]) -> T:
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(
            f"{path}: expected {name} of type {kind.__name__}, got {value!r:.80}; "
            "write the data set again"
        )
    if isinstance(value, int) and value > _MAX_COUNT:
        raise DataError(
            f"{path}: expected {name} of at most {_MAX_COUNT}; write the data set again"
        )
    return value


def read_shard(path: Path, entry: object) -> Shard:
    """A shard from its JSON object in the file at ``path``.

    Raises:
        DataError: a field that is missing or wrong, or a name that leaves the folder.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{path}: expected a JSON object for each shard, got {entry!r:.80}")
    shard = Shard(
        _field(path, entry, "file", str),
        _field(path, entry, "count", int),
        _field(path, entry, "bytes", int),
        _field(path, entry, "sha256", str),
    )
    # Error messages print the name.
    if not (is_plain_name(shard.file) and shard.file.isprintable() and len(shard.file) < 256):
        raise DataError(
            f"{path}: expected the plain name of a file in its folder, got {shard.file!r:.80}; "
            "do not use this data set if its origin is in doubt"
        )
    if shard.count < 1:
        raise DataError(f"{path}: expected {shard.file} of at least one row, got {shard.count}")
    return shard


def regular_file_size(path: Path) -> int:
    """Size in bytes of a regular file, which a link may reach only inside its own folder.

    Raises:
        DataError: anything else, such as a pipe, which would block for ever.
    """
    try:
        leaves = path.is_symlink() and path.resolve().parent != path.parent.resolve()
        facts = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it from a copy or harvest again") from None
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a ring of links
        raise DataError(f"{path} cannot be opened ({error!s:.200}); harvest again") from None
    if leaves:
        raise DataError(f"{path} is a link that leaves the folder; put the file itself there")
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"{path} is no file but a folder, a pipe or a device; harvest again")
    return facts.st_size
