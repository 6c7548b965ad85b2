"""Safe reading of NumPy's ``.npz``: numeric arrays whose sizes the file confirms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.io.archives import open_checked
from sae_kernels.io.tensor_files import Sizes, Stored, Tensors, reading

if TYPE_CHECKING:
    import zipfile
    from pathlib import Path

_WHAT = "an .npz file of numbers"
_DIMENSIONS, _HEADER = 8, 1024


def stored_npz(path: Path) -> Stored:
    """Opens an .npz file and reads the header of each array.

    Raises:
        DataError: a missing or damaged file, one that would unpack to far more than its size, or
            an array of objects; `load` raises it too.
    """
    with reading(path, _WHAT), path.open("rb") as file, open_checked(file) as archive:
        sizes: Sizes = dict(_header(archive, entry) for entry in archive.infolist())

    def load() -> Tensors:
        with reading(path, _WHAT), path.open("rb") as file, open_checked(file) as archive:
            return {name: _array(archive, f"{name}.npy") for name in sizes}

    return Stored(path, sizes, load)


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[str, tuple[int, ...]]:
    """An array's name and shape; its bytes must fill the entry exactly."""
    from numpy.lib import format as npy

    name = entry.filename
    if not name.endswith(".npy"):
        raise ValueError(f"{name!r:.80} is no array")
    with archive.open(entry) as file:
        if (version := npy.read_magic(file)) != (1, 0):  # later ones allow headers of gigabytes
            raise ValueError(f"{name!r:.80} has a header of version {version}, not (1, 0)")
        read: Any = npy.read_array_header_1_0  # NumPy's stubs lack max_header_size
        shape, _, dtype = read(file, max_header_size=_HEADER)
        start = file.tell()
    if dtype.kind not in "fiu" or dtype.itemsize > 8 or dtype.subdtype is not None:
        raise ValueError(f"{name!r:.80} holds {dtype!s:.80}, no numbers")
    if len(shape) > _DIMENSIONS or any(n < 0 for n in shape):
        raise ValueError(f"{name!r:.80} has the shape {shape!s:.80}")
    if start + math.prod(shape) * dtype.itemsize != entry.file_size:
        raise ValueError(f"{name!r:.80} claims the shape {shape} in {entry.file_size} bytes")
    return name.removesuffix(".npy"), tuple(shape)


def _array(archive: zipfile.ZipFile, name: str) -> torch.Tensor:
    from numpy.lib import format as npy

    with archive.open(name) as file:
        array = npy.read_array(file, allow_pickle=False)
        file.read(1)  # zipfile compares the checksum at the entry's end
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
