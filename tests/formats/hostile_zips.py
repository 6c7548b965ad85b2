"""Zip files as no honest writer makes them, and the pickles that go into them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

STORED, DEFLATED, BZIP2, LZMA = 0, 8, 12, 14


class Entry(NamedTuple):
    """One entry; whatever is not given is what is true of its bytes."""

    name: str
    data: bytes
    method: int = STORED
    size: int | None = None
    crc: int | None = None
    at: int | None = None
    flags: int = 0


def zip_of(*entries: Entry, comment: bytes = b"", before: bytes = b"") -> bytes:
    """The entries one after the other; one with `at` has no bytes of its own."""
    body, directory = bytearray(before), bytearray()
    for e in entries:
        size = len(e.data) if e.size is None else e.size
        crc = zlib.crc32(e.data) if e.crc is None else e.crc
        name = e.name.encode()
        fields = (20, e.flags, e.method, 0, 0, crc, len(e.data), size, len(name), 0)
        at = len(body) if e.at is None else e.at
        if e.at is None:
            body += struct.pack("<4s5H3L2H", b"PK\3\4", *fields) + name + e.data
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, *fields, 0, 0, 0, 0, at) + name
    count = min(len(entries), 0xFFFF)
    sizes = (0, 0, count, count, len(directory), len(body), len(comment))
    return bytes(body + directory) + struct.pack("<4s4H2LH", b"PK\5\6", *sizes) + comment


def entries_of(content: bytes) -> list[Entry]:
    """What an honest zip file holds."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return [Entry(name, file.read(name)) for name in file.namelist()]


def swap(content: bytes, *entries: Entry) -> bytes:
    """The same zip file with other entries of these names."""
    others = {entry.name: entry for entry in entries}
    return zip_of(*({entry.name: entry for entry in entries_of(content)} | others).values())


def zeros(mebibytes: int) -> bytes:
    """So many deflated zeros, without deflating them all: blocks that stand alone repeat."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + b"\3\0"


def npy(header: Any, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """An array's entry; the header is text, or an array's shape in fp32."""
    if not isinstance(header, str):
        header = str({"descr": "<f4", "fortran_order": False, "shape": header})
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == b"\1\0" else "<L", len(text))
    return np.lib.format.MAGIC_PREFIX + version + length + text + data


# -- pickles ---------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str, numel: int, kind: str = "FloatStorage", old: bool = False) -> bytes:
    end = b"NtQ" if old else b"tQ"
    head = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n"
    return head + text(key) + text("cpu") + number(numel) + end


def tensor(where: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    window = number(offset) + numbers(*size) + numbers(*stride)
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + where + window + b"\x89" + hooks + b"tR"


def state(**values: bytes) -> bytes:
    """A pickled dictionary of pickled values."""
    pairs = b"".join(text(name) + value for name, value in values.items())
    return b"\x80\x02}(" + pairs + b"u."
