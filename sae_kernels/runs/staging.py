"""Tensors copied into one reused buffer, as they will lie in their file.

The training goes on while a thread writes the copy. safetensors' own writer turns every tensor into
a second copy, in new memory each time; the format is simple enough to stream from here, with the
checksum taken on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK = 4 << 20


class Written(NamedTuple):
    """A file as the manifest knows it."""

    bytes: int
    sha256: str


class Staging:
    """A buffer for the tensors of one file.

    Example:
        >>> import tempfile, pathlib
        >>> from safetensors.torch import load_file
        >>> staging = Staging()
        >>> staging.take({"x": torch.arange(3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "x.safetensors")
        ...     _ = staging.write(path)
        ...     load_file(path)
        {'x': tensor([0, 1, 2])}
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._header = b""
        self._filled = 0

    @property
    def nbytes(self) -> int:
        """The memory that it holds."""
        return self._buffer.numel()

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the tensors, which may change afterwards; the buffer grows where it must."""
        # Wide elements first, so that each lies at a multiple of its size.
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header, places, end = {}, {}, 0
        for name in order:
            tensor = tensors[name]
            start, end = end, end + tensor.numel() * tensor.element_size()
            places[name] = slice(start, end)
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        if end > self._buffer.numel():
            on_gpu = any(tensor.is_cuda for tensor in tensors.values())
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        for name, place in places.items():
            tensor = tensors[name]
            self._buffer[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header, self._filled = len(text).to_bytes(8, "little") + text, end

    def write(self, path: Path) -> Written:
        """Writes what was taken last as a safetensors file, flushed to the disk."""
        sha256 = hashlib.sha256(self._header)
        content = memoryview(self._buffer.numpy())[: self._filled]  # type: ignore[arg-type]
        with path.open("wb", buffering=0) as file:
            _write(file.fileno(), memoryview(self._header))
            for start in range(0, self._filled, _BLOCK):
                block = content[start : start + _BLOCK]
                sha256.update(block)
                _write(file.fileno(), block)
            os.fsync(file.fileno())
        return Written(len(self._header) + self._filled, sha256.hexdigest())


def _write(descriptor: int, block: memoryview) -> None:
    while block:  # a write may take a part only
        block = block[os.write(descriptor, block) :]
