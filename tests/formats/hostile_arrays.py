"""Cases made for .npz files."""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
from hostile_weights import Made, Touch, cases, with_code
from hostile_zips import (
    BZIP2,
    DEFLATED,
    LZMA,
    STORED,
    Entry,
    entries_of,
    npy,
    swap,
    zeros,
    zip_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOUR_GIB = (1 << 32) - 1  # the most that an entry claims without zip64
_BIG = npy((1 << 30,))


def NPZ(file: str, whole: bytes) -> Iterator[Made]:
    entry = "W_enc.npy"
    true = {e.name: e for e in entries_of(whole)}
    W_enc = true[entry].data

    def with_entry(data: bytes, **options: Any) -> bytes:
        return swap(whole, Entry(entry, data, **options))

    objects = io.BytesIO()
    np.savez(objects, W_enc=np.array([Touch()] * 3, dtype=object))
    object_array = npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}")
    shape = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"
    numbers = bytes(4096)
    names = ("../W.npy", "/etc/W.npy", "a//W.npy", "a\\W.npy", "C:W.npy", "W.npy\n", "W" * 300)
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w", zipfile.ZIP_DEFLATED) as inner:
        inner.writestr("W_enc.npy", bytes(1 << 20))
    squeezed = zeros(4096)
    overlapping = [Entry(f"t{i}.npy", zeros(1), DEFLATED, 1 << 16, 0, at=0) for i in range(500)]
    yield from cases(file, with_code())
    yield from cases(file, {f"an entry named {name!r:.20}": _named(whole, name) for name in names})
    yield from cases(
        file,
        {
            "objects with code in it": objects.getvalue(),
            "an array of objects": with_entry(object_array + pickle.dumps(Touch(), 2)),
            "4 GiB of zeros": with_entry(_BIG + b"", method=STORED, size=_FOUR_GIB),
            "4 GiB of deflated zeros": with_entry(squeezed, method=DEFLATED, size=_FOUR_GIB),
            "deflated zeros that claim less": with_entry(
                squeezed, method=DEFLATED, size=len(W_enc)
            ),
            "deflated nothing": with_entry(b"\3\0", method=DEFLATED, size=len(W_enc)),
            "bzip2": with_entry(bz2.compress(W_enc), method=BZIP2, size=len(W_enc)),
            "lzma": with_entry(lzma.compress(W_enc), method=LZMA, size=len(W_enc)),
            "a zip in a zip": with_entry(nested.getvalue()),
            "500 names for one entry": zip_of(
                Entry("t.npy", zeros(1), DEFLATED, 1 << 16, 0), *overlapping
            ),
            "an entry in an entry": zip_of(
                Entry("t.npy", zip_of(Entry("u.npy", W_enc))), Entry("u.npy", W_enc, at=35)
            ),
            "an entry beyond the end": swap(whole, Entry(entry, W_enc, at=1 << 30)),
            "2,000 entries": zip_of(*(Entry(f"t{i}.npy", b"") for i in range(2000))),
            "60,000 entries": zip_of(*(Entry(f"t{i}.npy", b"", at=0) for i in range(60_000))),
            "two entries of a name": zip_of(*true.values(), Entry(entry, W_enc)),
            "an encrypted entry": with_entry(W_enc, flags=1),
            "a wrong checksum": with_entry(W_enc, crc=1),
            "no array": with_entry(b"hello"),
            "a name that is no array's": zip_of(*true.values(), Entry("W.txt", b"hello")),
            "a comment": zip_of(*true.values(), comment=b"PK\5\6" + bytes(18)),
            "bytes before it": zip_of(*true.values(), before=b"MZ" * 50),
            "bytes that shift it": b"MZ" * 50 + zip_of(*true.values()),
            "a shape of 2^60": with_entry(npy((1 << 30, 1 << 30), numbers)),
            "a shape that overflows": with_entry(npy((1 << 62, 4), numbers)),
            "a negative shape": with_entry(npy((-1, -1024), numbers)),
            "many dimensions": with_entry(npy((1,) * 900, bytes(4))),
            "a shape of many digits": with_entry(npy(shape % ("9" * 9000), numbers)),
            "a shape with code": with_entry(npy(shape % "__import__('os').system('touch ran')")),
            "a header that is a tower": with_entry(npy("(" * 9000, numbers)),
            "a header of minuses": with_entry(npy("-" * 9000 + "1", numbers)),
            "a header of a gigabyte": with_entry(b"\x93NUMPY\2\0\xff\xff\xff\x3f" + numbers),
            "a header of version 9": with_entry(b"\x93NUMPY\x09\x00" + numbers),
            "a structure": with_entry(
                npy(shape.replace("'<f4'", "[('a','<f4')]") % "(1024,)", numbers)
            ),
            "dates": with_entry(npy(shape.replace("<f4", "<M8[s]") % "(512,)", numbers)),
            "long doubles": with_entry(npy(shape.replace("<f4", "<f16") % "(256,)", numbers)),
            "empty text": with_entry(npy(shape.replace("<f4", "<U0") % "(99999999999,)")),
        },
    )


def _named(whole: bytes, name: str) -> bytes:
    return zip_of(*entries_of(whole), Entry(name, npy((1,), bytes(4))))
