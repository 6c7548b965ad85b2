"""Strangers' files, read so that nothing in them runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

Tensors = dict[str, torch.Tensor]


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


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: expected the file of a saved SAE, it is not there")


def _plain(tensor: torch.Tensor) -> bool:
    # A view can claim any shape over a few bytes (stride 0): copying it would take all memory.
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
