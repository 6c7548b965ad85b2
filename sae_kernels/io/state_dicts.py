"""Safe reading of state dicts of torch.save: checked first, then loaded with weights_only=True."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.errors import DataError
from sae_kernels.io.archives import open_checked
from sae_kernels.io.pickles import PickleInterpreter, View
from sae_kernels.io.tensor_files import HEADER_LIMIT, Stored, Tensors, reading

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

_WHAT = "a state dict of tensors, as torch.load takes it with weights_only=True"
_ADVICE = "; do not load it in another way unless you trust where it comes from"
# The first bytes of files of torch before version 1.6, a pickled number; no .tar file has them.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


def stored_state_dict(path: Path) -> Stored:
    """Opens a state dict of torch.save and reads its tensors' shapes, without allocating any.

    Raises:
        DataError: a missing or damaged file, or one that holds anything but dense tensors by name;
            `load` raises it too.
    """
    with reading(path, _WHAT, _ADVICE), path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        found = _zipped(file) if zipped else _old(file)
    if not isinstance(found, dict):
        got = "one tensor" if isinstance(found, View) else type(found).__name__
        raise DataError(f"{path}: expected a state dict of tensors, got {got}")
    for name, view in found.items():
        if not (isinstance(view, View) and view.dense):
            raise DataError(f"{path}: {name!r:.80}: expected a dense tensor")

    def load() -> Tensors:
        # torch would also accept other formats if it were given the path.
        with reading(path, _WHAT, _ADVICE), path.open("rb") as file:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
            return {name: tensor.detach() for name, tensor in tensors.items()}

    return Stored(path, {name: view.size for name, view in found.items()}, load)


def _zipped(file: BinaryIO) -> Any:
    """Interprets the pickle of a zip file, where every storage is an entry of its own."""
    with open_checked(file, stored=True) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        root = next(iter(sizes)).split("/")[0]
        if len({name.lower() for name in sizes}) < len(sizes):  # torch ignores case
            raise ValueError("two entries have one name")
        for name, size in sizes.items():
            if size > HEADER_LIMIT and not name.startswith(f"{root}/data/"):
                raise ValueError(f"{name!r:.80} has {size} bytes, {HEADER_LIMIT} are the most")
        pickles = PickleInterpreter(io.BytesIO(archive.read(f"{root}/data.pkl")))
    found = pickles.read()
    for storage in pickles.storages.values():
        if sizes.get(f"{root}/data/{storage.key}") != storage.nbytes:
            raise ValueError(f"storage {storage.key!r:.80} claims {storage.nbytes} bytes")
    return found


def _old(file: BinaryIO) -> Any:
    """Interprets an old file: five pickles, then each storage's length and numbers."""
    length = file.seek(0, 2)
    file.seek(0)
    head = io.BytesIO(file.read(HEADER_LIMIT))
    if not head.getbuffer()[: len(_OLD)] == _OLD:
        raise ValueError("neither a zip file nor a pickle of torch.save")
    pickles = PickleInterpreter(head)
    _, _, _, found, keys = (pickles.read() for _ in range(5))
    if not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(pickles.storages):
        raise ValueError("the storages are not those of the tensors")
    file.seek(head.tell())
    for key in keys:
        storage = pickles.storages[key]
        if int.from_bytes(file.read(8), "little") != storage.numel:
            raise ValueError(f"storage {key!r:.80} claims {storage.numel} numbers")
        file.seek(storage.nbytes, 1)
    if file.tell() != length:
        raise ValueError(f"{length} bytes, where the storages end at {file.tell()}")
    return found
