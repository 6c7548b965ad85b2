"""Cases made for safetensors files, and for all weights: pickles with code in their place."""

from __future__ import annotations

import io
import json
import os
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Made = tuple[str, "Callable[[Path], object]", bool]
_HUGE = 1 << 40


class Touch:
    """Unpickled, it would leave a file: `hostile_run` looks for it after every case."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch ran",)


def cases(file: str, contents: dict[str, bytes]) -> Iterator[Made]:
    for name, content in contents.items():
        yield name, lambda folder, c=content: (folder / file).write_bytes(c), True


def with_code() -> dict[str, bytes]:
    saved = io.BytesIO()
    torch.save({"W_enc": Touch()}, saved)
    old = io.BytesIO()
    torch.save({"W_enc": Touch()}, old, _use_new_zipfile_serialization=False)
    return {
        "a pickle with code": pickle.dumps({"W_enc": Touch()}, protocol=2),
        "a pickle of protocol 0 with code": pickle.dumps(Touch(), protocol=0),
        "torch.save with code": saved.getvalue(),
        "an old torch.save with code": old.getvalue(),
        "objects with code": np.array([Touch()], dtype=object).dumps(),
    }


# -- safetensors -----------------------------------------------------------------------------------


def _packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + data


def SAFETENSORS(file: str, whole: bytes) -> Iterator[Made]:
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    name = next(name for name in header if name != "__metadata__")

    def lie(**changes: Any) -> bytes:
        return _packed({**header, name: {**header[name], **changes}}, data)

    yield from cases(file, with_code())
    yield from cases(
        file,
        {
            "a header of 2^63 bytes": _packed(header, data, 1 << 63),
            "a header as long as the file": _packed(header, data, len(whole)),
            "a header of no bytes": _packed(header, data, 0),
            "a header of 50 MB": _packed(b" " * 50_000_000),
            "100,000 tensors": _packed(
                {
                    f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                    for i in range(10**5)
                }
            ),
            "a tower for a header": _packed(b'{"a":' * 100_000),
            "a huge shape": lie(shape=[1 << 40, 1 << 40]),
            "a shape that overflows": lie(shape=[1 << 63, 1 << 63, 4]),
            "a shape of nothing": lie(shape=[0, 1 << 62]),
            "a negative shape": lie(shape=[-1, -16]),
            "many dimensions": lie(shape=[1] * 10_000),
            "offsets that go back": lie(data_offsets=[len(data), 0]),
            "offsets beyond the end": lie(data_offsets=[0, _HUGE]),
            "a number type of nobody": lie(dtype="F512"),
            "an odd number type": lie(dtype="F4"),
            "a path for a name": _packed({**header, "../../x": header[name]}, data),
            "a line in a name": _packed(
                {"a\nb\u202e": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
            ),
            "two names for the same bytes": _packed({**header, "twin": header[name]}, data),
        },
    )

    def honest_but_huge(folder: Path) -> None:
        """A sparse file of 400 MiB that holds what its header says."""
        size = 400 << 20
        one = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
        content = _packed({name: one})
        (folder / file).write_bytes(content)
        os.truncate(folder / file, len(content) + size)

    yield "honest and 400 MiB", honest_but_huge, True
