"""The metric file: one JSON object per line, readable up to the last complete line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import DataError
from sae_kernels.io.files import publish

if TYPE_CHECKING:
    from collections.abc import Mapping

_BLOCK = 1 << 16  # bytes read at a time in search of the last line's end


class MetricLog:
    """Appends metric lines to a file, each flushed as soon as it is written.

    An existing file is continued, after an incomplete last line of a killed run is cut off.

    Args:
        path: the file; made when missing.
        until: the step of the checkpoint that a run is resumed from. Lines of later steps are
            removed, since those steps are made again.

    Raises:
        DataError: with ``until``, a line that is not a JSON object.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> with MetricLog(path) as log:
        ...     log.write({"step": 10, "loss": 0.5})
        ...     log.write({"step": 20, "loss": float("nan")})
        >>> read_metrics(path)
        [{'step': 10, 'loss': 0.5}, {'step': 20, 'loss': None}]
        >>> MetricLog(path, until=10).close()
        >>> read_metrics(path)
        [{'step': 10, 'loss': 0.5}]
    """

    def __init__(self, path: str | Path, *, until: int | None = None) -> None:
        path = Path(path)
        _cut_unfinished(path)
        if until is not None:
            _drop_after(path, until)
        self._file = path.open("a", encoding="utf-8", buffering=1, newline="\n")

    def write(self, values: Mapping[str, Any]) -> None:
        """Writes one line; numbers that are not finite become null, as JSON has none."""
        self._file.write(json.dumps(jsonable(dict(values)), allow_nan=False) + "\n")

    def sync(self) -> None:
        """Flushes the lines to the disk, so that they survive a power failure."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads a metric file, without an incomplete last line (of a killed run).

    Raises:
        DataError: a line that is not a JSON object; the message has its number.
        OSError: no such file, or one that cannot be read.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def jsonable(value: Any) -> Any:
    """Converts to JSON values: numbers that are not finite to null, other types to strings."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values: Any = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: line {number}: expected a JSON object, it cannot be read ({error}); remove "
            "the line, or restore the file from a copy"
        ) from error
    if not isinstance(values, dict):
        raise DataError(
            f"{path}: line {number}: expected a JSON object, got {type(values).__name__}; remove "
            "the line, or restore the file from a copy"
        )
    return values


def _cut_unfinished(path: Path) -> None:
    """Truncates a file after its last newline."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]
    steps = [_parse(path, number, line).get("step") for number, line in enumerate(lines, 1)]
    kept = [
        line
        for line, made in zip(lines, steps, strict=True)
        if not (isinstance(made, int) and made > step)
    ]
    if len(kept) < len(lines):
        publish(path, lambda partial: partial.write_bytes(b"".join(kept)))
