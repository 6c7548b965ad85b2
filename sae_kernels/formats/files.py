"""Strangers' files, read so that nothing in them runs, and folders that appear whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

Tensors = dict[str, torch.Tensor]


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        DataError: no file, no JSON, or something else than an object.
    """
    _must_exist(path)
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON object ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def whole(path: Path, values: dict[str, Any], key: str, default: int | None = None) -> int:
    """An integer of a JSON object.

    Raises:
        DataError: the key is missing and has no default, or holds something else.
    """
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{path}: {key}: expected an integer of at least 0, got {value!r:.80}")
    return value


def flag(path: Path, values: dict[str, Any], key: str, default: bool) -> bool:
    """A truth value of a JSON object.

    Raises:
        DataError: the key holds something else.
    """
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise DataError(f"{path}: {key}: expected true or false, got {value!r:.80}")
    return value


def read_safetensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        DataError: no file, or a damaged one.
    """
    _must_exist(path)
    try:
        tensors: Tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: expected a safetensors file, it cannot be read ({error})"
        ) from error
    return tensors


def read_state_dict(path: Path) -> Tensors:
    """A state dict that torch.save wrote, on the CPU; its pickle may hold tensors and no code.

    Raises:
        DataError: no file, a damaged one, or anything but tensors by name in it.
    """
    _must_exist(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can raise anything
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: expected a state dict of tensors; torch.load refuses the file with "
            f"weights_only=True ({type(error).__name__}: {reason:.120}); do not load it in another "
            "way unless you trust where it comes from"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a state dict of tensors, got {type(found).__name__}")
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor) and _plain(value)):
            raise DataError(f"{path}: {name!r:.80}: expected a dense tensor")
    return {name: value.detach() for name, value in found.items()}


def read_npz(path: Path) -> Tensors:
    """All arrays of an .npz file as tensors; numbers only.

    Raises:
        DataError: no file, a damaged one, or an array of objects in it.
    """
    import numpy as np

    _must_exist(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            native = {name: a.astype(a.dtype.newbyteorder("=")) for name, a in arrays.items()}
            return {name: torch.from_numpy(array) for name, array in native.items()}
    except Exception as error:  # zip, header and array can each be damaged in their own way
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: expected an .npz file of numbers, it cannot be read "
            f"({type(error).__name__}: {reason:.120})"
        ) from error


def publish(folder: str | Path, files: dict[str, Callable[[Path], object]]) -> None:
    """Writes the files of a folder beside their places and moves them there when all are whole.

    Args:
        folder: made when missing; other files in it stay.
        files: by name, what writes each to the path that it is given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.{os.getpid()}" for name in files}
    try:
        for name, write in files.items():
            write(partial[name])
        for name, path in partial.items():
            os.replace(path, folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def json_writer(values: dict[str, Any]) -> Callable[[Path], object]:
    """For `publish`: writes a JSON object.

    Raises:
        ValueError, TypeError: at once, for what JSON cannot hold.
    """
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: expected the file of a saved SAE, it is not there")


def _plain(tensor: torch.Tensor) -> bool:
    # A view can claim any shape over a few bytes (stride 0): copying it would take all memory.
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
