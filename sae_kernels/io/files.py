"""Atomic writes of files and folders, JSON files, and SHA-256 checksums.

Everything is written to a temporary sibling, flushed to the disk and renamed. A process that dies
in between leaves the sibling, whose name holds host and process id: :func:`remove_stale` finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

JSON_LIMIT = 64 << 20  # bytes; the longest of our files is an index of a million shards
_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-(?P<host>[\w-]+)-(?P<pid>\d+)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, and renames it to ``path`` at the end.

    The block creates a file, which replaces an existing one, or a folder of files that it flushes
    itself, where none may exist. After an error the old content stays.
    """
    remove_stale(path.parent, path.name)
    partial = path.with_name(f".{path.name}.partial-{_host()}-{os.getpid()}")
    _remove(partial)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        _remove(partial)
    sync(path.parent)


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically: ``write`` creates a temporary sibling, renamed to ``path``."""
    with replacing(path) as partial:
        write(partial)


def publish_all(folder: str | Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes several files of a folder, none of which is replaced before all are written.

    Args:
        folder: made when missing; other files in it stay.
        files: by name, a function that writes the file to the path it is given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    with ExitStack() as stack:
        for name, write in files.items():
            write(stack.enter_context(replacing(folder / name)))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file of this content atomically."""
    publish(path, lambda partial: partial.write_bytes(content))


def json_writer(values: Mapping[str, Any]) -> Callable[[Path], object]:
    """A function for :func:`publish` that writes a JSON object.

    Raises:
        ValueError, TypeError: at once, for values that JSON cannot represent.
    """
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def read_json(path: Path, what: str = "a JSON object", limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        DataError: a missing file, one above ``limit`` bytes, invalid JSON, or no object.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: expected {what}, it is not there")
        if (size := path.stat().st_size) > limit:
            raise DataError(f"{path}: expected {what} of at most {limit} bytes, got {size}")
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected {what}, it cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file, or a folder's directory entry, to the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_plain_name(name: str) -> bool:
    """Whether a name stays in its folder: no separator or drive letter of any system, no dots."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def remove_stale(folder: Path, name: str | None = None, *, of_anyone: bool = False) -> None:
    """Removes temporary siblings left by dead processes, of one file name or of all.

    A process of another machine counts as alive. ``of_anyone`` removes all, for a caller that has
    locked the folder.
    """
    host = _host()
    for path in folder.glob(".*.partial-*"):
        left = _PARTIAL.fullmatch(path.name)
        if left is None or (name is not None and left["name"] != name):
            continue
        if of_anyone or (left["host"] == host and not _alive(int(left["pid"]))):
            _remove(path)


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # on POSIX systems, which setup.py insists on, this only asks
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
