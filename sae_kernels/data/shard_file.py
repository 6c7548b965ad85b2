"""Reading one shard: its header and checksum are checked before its rows are mapped."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from sae_kernels.data.rows import Rows
from sae_kernels.data.shard_index import INDEX, regular_file_size
from sae_kernels.errors import DataError
from sae_kernels.io.files import digest
from sae_kernels.io.tensor_files import STORED_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sae_kernels.data.shard_index import Index, Shard

_HEADER_LIMIT = 1 << 20  # bytes; three tensors and some metadata need a few hundred


class ShardReader:
    """Checks and maps the shards of a folder.

    Args:
        folder: the folder of the index.
        index: describes the shards.
        check_content: compare a shard's SHA-256 when it is mapped for the first time.
    """

    def __init__(self, folder: Path, index: Index, check_content: bool) -> None:
        self.folder, self.check_content = folder, check_content
        self.columns, self._d_in, self._dtype = index.columns, index.d_in, index.dtype
        self._checked: set[Shard] = set()

    def map(self, shard: Shard) -> Rows:
        """A shard's rows, views of the file."""
        with self._opened(shard) as file:
            if self.check_content and shard not in self._checked:
                if not is_unchanged(self.folder, shard):
                    raise DataError(changed_message(self.folder, [shard]))
                self._checked.add(shard)
            try:
                return Rows(**{name: file.get_tensor(name) for name in self.columns})
            except (OSError, SafetensorError) as error:
                path = self.folder / shard.file
                raise DataError(f"{path} changed while it was opened ({error!s:.200})") from None

    def check_header(self, shard: Shard) -> None:
        """Compares size and header with the index; reads no payload.

        Raises:
            DataError: a file that is missing, not a regular file, or not the one of the index.
        """
        with self._opened(shard):
            pass

    @contextmanager
    def _opened(self, shard: Shard) -> Iterator[Any]:
        """Opens a shard whose size and header agree with the index."""
        path = self.folder / shard.file
        size = regular_file_size(path)
        if size != shard.bytes:
            raise DataError(
                f"{path}: expected {shard.bytes} bytes, got {size}; the file was cut or replaced, "
                "restore it from a copy or harvest again"
            )
        payload = shard.count * (self._d_in * self._dtype.itemsize + 4 * (len(self.columns) - 1))
        if size - payload > _HEADER_LIMIT:
            raise DataError(
                f"{path}: expected {payload} bytes of rows and at most {_HEADER_LIMIT} of header, "
                f"got {size}; this is no shard of this data set, harvest again"
            )
        expected = {name: ("I32", [shard.count]) for name in self.columns}
        expected["activations"] = (STORED_DTYPES[self._dtype], [shard.count, self._d_in])
        with ExitStack() as stack:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{path} is no safetensors file ({error!s:.200}); restore it from a copy or "
                    "harvest again"
                ) from None
            if found != expected:
                raise DataError(
                    f"{path}: expected {expected} as {INDEX} says, got {found!r:.200}; put the "
                    "shard of this data set there or harvest again"
                )
            yield file


def is_unchanged(folder: Path, shard: Shard) -> bool:
    """Compares a shard's size, then its SHA-256, for which the whole file is read.

    Raises:
        DataError: no regular file is there.
    """
    path = folder / shard.file
    return regular_file_size(path) == shard.bytes and digest(path) == shard.sha256


def changed_message(folder: Path, shards: list[Shard]) -> str:
    """The error message for shards whose SHA-256 differs from the index."""
    names = ", ".join(shard.file for shard in shards)
    return (
        f"{folder}: {names} changed since written (SHA-256 differs); restore from a copy or "
        "harvest again"
    )
