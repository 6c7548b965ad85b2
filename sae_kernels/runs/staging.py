"""A reusable buffer that holds a copy of tensors in safetensors layout.

Training continues while a thread writes the copy. safetensors' own writer would copy every tensor
again, to new memory each time; here the buffer is streamed to the file and hashed on the way.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.io.tensor_files import STORED_DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_BLOCK = 4 << 20
_PAGE = 4096  # alignment that direct writes need, of memory, offset and length


class Written(NamedTuple):
    """Size in bytes and SHA-256 of a written file."""

    bytes: int
    sha256: str


def layout(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> tuple[bytes, dict[str, slice]]:
    """The header of a safetensors file, and the place of each tensor in the file, in bytes.

    Args:
        tensors: dtype and shape of each by name.
    """
    header, places, end = {}, {}, 0
    # Widest dtype first, so that each tensor is aligned to its element size.
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        places[name] = slice(start, end)
        header[name] = {
            "dtype": STORED_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    moved = {n: slice(len(head) + p.start, len(head) + p.stop) for n, p in places.items()}
    return head, moved


class Staging:
    """A reusable buffer for the tensors of one safetensors file.

    Example:
        >>> import tempfile, pathlib
        >>> from safetensors.torch import load_file
        >>> staging = Staging()
        >>> staging.fill({"x": torch.arange(3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "x.safetensors")
        ...     _ = staging.write(path)
        ...     load_file(path)
        {'x': tensor([0, 1, 2])}
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)  # starts at a multiple of _PAGE
        self._filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the buffer takes."""
        return self._buffer.numel()

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the tensors to the buffer, which grows as needed; they may change afterwards."""
        head, places = layout({name: (t.dtype, t.shape) for name, t in tensors.items()})
        self._filled = max((place.stop for place in places.values()), default=len(head))
        self._reserve(self._filled, any(tensor.is_cuda for tensor in tensors.values()))
        self._buffer[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        for name, place_of in places.items():
            tensor, place = tensors[name], self._buffer[place_of]
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def write(self, path: Path) -> Written:
        """Writes the buffer's tensors as a safetensors file, flushed to the disk."""
        sha256 = hashlib.sha256()
        content = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        descriptor, direct = _opened(path)
        try:
            for start in range(0, self._filled, _BLOCK):
                stop = min(start + _BLOCK, self._filled)
                sha256.update(content[start:stop])
                # Direct writes are whole pages; ftruncate cuts the excess off.
                direct = _write(descriptor, content[start : stop + -stop % _PAGE], direct)
            os.ftruncate(descriptor, self._filled)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return Written(self._filled, sha256.hexdigest())

    def _reserve(self, size: int, pinned: bool) -> None:
        size += -size % _PAGE
        if size > self._buffer.numel():
            raw = torch.empty(size + _PAGE, dtype=torch.uint8, pin_memory=pinned)
            skipped = -raw.data_ptr() % _PAGE
            self._buffer = raw[skipped : skipped + size]


def _opened(path: Path) -> tuple[int, bool]:
    """Opens a new file, for writes past the system's page cache (O_DIRECT) where supported.

    Copying to that cache is the dearest part of a write, and nothing reads the file soon.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):
            return os.open(path, flags | os.O_DIRECT, 0o666), True
    return os.open(path, flags, 0o666), False


def _write(descriptor: int, block: memoryview, direct: bool) -> bool:
    """Writes a block; returns whether direct writes still work."""
    while block:  # a write may take a part only
        try:
            block = block[os.write(descriptor, block) :]
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            import fcntl  # exists wherever O_DIRECT does

            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            direct = False
    return direct
