"""Checkpoints: folders that are written atomically and verified before they are loaded.

``step_00001000/`` holds safetensors and JSON files and, written last, ``manifest.json`` with the
size and SHA-256 of each. The folder is written and flushed under a temporary name, then renamed,
then its parent is flushed. Nothing is pickled.
"""

from __future__ import annotations

import re
import shutil
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.errors import DataError
from sae_kernels.io.files import digest, is_plain_name, json_writer, read_json, replacing, sync
from sae_kernels.io.tensor_files import read_safetensors
from sae_kernels.runs.staging import Staging, Written

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
SHARD = "shard-"  # starts the names of files that hold some rows, from a run on several processes
FORMAT, VERSION = "sae_kernels.checkpoint", 1
_NAME = re.compile(r"step_(\d{8,})")
_FILES_LIMIT = 4096  # a file a process, and a few


class Contents(NamedTuple):
    """The tensors and JSON values of a checkpoint, by file name."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    values: Mapping[str, Mapping[str, Any]]


class Manifest(NamedTuple):
    """The content of ``manifest.json``: the step, and size and SHA-256 of each file."""

    step: int
    files: dict[str, Written]


def path_of(parent: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return parent / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def steps(parent: Path) -> list[int]:
    """The steps that have a checkpoint, damaged or not, in ascending order."""
    if not parent.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in parent.iterdir())
    return sorted(int(name[1]) for name in found if name)


def write(
    parent: Path,
    step: int,
    staged: Mapping[str, Staging],
    values: Mapping[str, Mapping[str, Any]],
    others: Callable[[Path], Mapping[str, Written]] = lambda partial: {},
) -> Path:
    """Writes a checkpoint of staged tensors and JSON objects, replacing one of the same step.

    ``others`` writes further files into the folder that it is given, and returns them by name.
    """
    parent.mkdir(parents=True, exist_ok=True)
    path = path_of(parent, step)
    with replacing(path) as partial:
        partial.mkdir()
        files = {name: staging.write(partial / name) for name, staging in staged.items()}
        files |= others(partial)
        for name, record in values.items():
            files[name] = _write_json(partial / name, record)
        listed = {name: file._asdict() for name, file in files.items()}
        record = {"format": FORMAT, "version": VERSION, "step": step, "files": listed}
        _write_json(partial / MANIFEST, record)
        if path.exists():  # damaged, or written before the run was resumed from an earlier step
            shutil.rmtree(path)
    return path


def verify(path: Path) -> Manifest:
    """Compares every file of a checkpoint with its manifest.

    Raises:
        DataError: a file is missing, truncated, changed or not listed; the message names it.
    """
    record = read_json(path / MANIFEST, "the manifest of a checkpoint")
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise DataError(
            f"{path / MANIFEST}: expected {FORMAT} version {VERSION}, got "
            f"{record.get('format')!r:.40} version {record.get('version')!r:.40}; read it with the "
            "version of sae_kernels that wrote it"
        )
    step, files = record.get("step"), record.get("files")
    if not isinstance(files, dict) or not 0 < len(files) <= _FILES_LIMIT:
        raise DataError(f"{path / MANIFEST}: expected the files of a checkpoint, got {files!r:.80}")
    if type(step) is not int or path.name != path_of(path.parent, step).name:
        raise DataError(f"{path / MANIFEST}: expected the step of {path.name}, got {step!r:.40}")
    return Manifest(step, {name: _verify(path, name, entry) for name, entry in files.items()})


def read(path: Path) -> Contents:
    """Verifies a checkpoint and loads all of it, tensors on the CPU.

    Raises:
        DataError: as :func:`verify`.
        ValueError: a checkpoint of several processes.
    """
    tensors, values = {}, {}
    files = verify(path).files
    if any(name.startswith(SHARD) for name in files):
        raise ValueError(
            f"{path}: expected a checkpoint of one process, it is of several; resume it by "
            "torchrun, on however many (docs/distributed.md)"
        )
    for name in files:
        if name.endswith(".safetensors"):
            tensors[name] = read_safetensors(path / name)
        else:
            values[name] = read_json(path / name)
    return Contents(tensors, values)


def read_values(path: Path) -> Contents:
    """Verifies a checkpoint and loads its JSON values alone.

    Raises:
        DataError: as :func:`verify`.
    """
    names = [name for name in verify(path).files if not name.endswith(".safetensors")]
    return Contents({}, {name: read_json(path / name) for name in names})


def newest(parent: Path, read: Callable[[Path], Contents] = read) -> tuple[Path, Contents] | None:
    """Path and contents of the newest undamaged checkpoint, with a warning for each damaged one.

    Args:
        parent: the folder of the checkpoints.
        read: verifies and reads one.

    Raises:
        DataError: there are checkpoints and all of them are damaged.
    """
    reasons = []
    for step in reversed(steps(parent)):
        path = path_of(parent, step)
        try:
            contents = read(path)
        except DataError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(
                f"{reason}; this checkpoint is passed over, {path.name} before it is used",
                RuntimeWarning,
                stacklevel=2,
            )
        return path, contents
    if reasons:
        raise DataError(
            f"{parent}: expected a checkpoint that is whole, all are damaged: {'; '.join(reasons)}"
        )
    return None


def retain(parent: Path, step: int, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints up to this step; 0 removes none.

    Later ones go too: they date from before the run was resumed from an earlier step.
    """
    if not keep:
        return
    kept = [s for s in steps(parent) if s <= step][-keep:]
    for old in steps(parent):
        if old not in kept and old != step:
            shutil.rmtree(path_of(parent, old))


def _write_json(path: Path, record: Mapping[str, Any]) -> Written:
    json_writer(record)(path)
    sync(path)
    return Written(path.stat().st_size, digest(path))


def _verify(path: Path, name: str, entry: Any) -> Written:
    expected = entry if isinstance(entry, dict) else {}
    size, sha256 = expected.get("bytes"), expected.get("sha256")
    if not is_plain_name(name) or type(size) is not int or not isinstance(sha256, str):
        raise DataError(f"{path / MANIFEST}: expected a file's name, size and SHA-256, got {name}")
    file = path / name
    if file.is_symlink() or not file.is_file():
        raise DataError(f"{file}: expected a file of the checkpoint, it is not there")
    if file.stat().st_size != size:
        raise DataError(f"{file}: expected {size} bytes, got {file.stat().st_size}")
    if digest(file) != sha256:
        raise DataError(f"{file}: changed since it was written (SHA-256 differs)")
    return Written(size, sha256)
