"""Cases made for .pt files, as torch writes them and as it did before version 1.6."""

from __future__ import annotations

import io
import tarfile
import zipfile
from typing import TYPE_CHECKING

from hostile_weights import Made, cases, with_code
from hostile_zips import (
    DEFLATED,
    Entry,
    entries_of,
    number,
    state,
    storage,
    tensor,
    text,
    zeros,
    zip_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUGE = 1 << 40
_VECTOR = tensor(storage("0", 4), (4,), (1,))


def _bodies(old: bool) -> dict[str, bytes]:
    """Pickles of a state dict; "0" is a storage of four numbers."""

    def view(size: tuple[int, ...], stride: tuple[int, ...], **options: int) -> bytes:
        return state(bias=tensor(storage("0", 4, old=old), size, stride, **options))

    fine = storage("0", 4, old=old)
    made = b"c__builtin__\nbytearray\n" + number((1 << 31) - 1) + b"\x85R"
    pairs = b"".join(b"q\x01h\x01\x86" for _ in range(60))
    return {
        "a bytearray of 2 GiB": state(bias=made),
        "a tensor of 2^31 numbers": state(bias=b"ctorch\nTensor\n" + number(1 << 31) + b"\x85R"),
        "a storage of 2^40 bytes": state(
            bias=b"ctorch.storage\nUntypedStorage\n" + number(_HUGE) + b"\x85R"
        ),
        "a name that hashes for ever": b"\x80\x02})" + pairs + b"K\x01s.",
        "a name a million tuples deep": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
        "a value that prints for ever": b"\x80\x02}X\x01\x00\x00\x00a)" + pairs + b"s.",
        "text that doubles": state(
            bias=b"c_codecs\nencode\n" + text("a" * 99) + text("hex") + b"\x86R"
        ),
        "text of 4 GiB": b"\x80\x02}X\xff\xff\xff\xff" + bytes(64),
        "text of 2^63 bytes": b"\x80\x04}\x8d" + b"\xff" * 7 + b"\x7f" + bytes(64),
        "a million operations": b"\x80\x02" + b"N" * 1_000_000 + b".",
        "a dictionary in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "a storage that claims 2^40 numbers": state(
            bias=tensor(storage("0", _HUGE, old=old), (_HUGE,), (1,))
        ),
        "a storage that claims 1,000 numbers": state(
            bias=tensor(storage("0", 1000, old=old), (1000,), (1,))
        ),
        "a storage that claims -4 numbers": state(
            bias=tensor(storage("0", -4, old=old), (4,), (1,))
        ),
        "a storage that claims two sizes": state(
            bias=tensor(fine, (4,), (1,)), b=tensor(storage("0", 2, old=old), (2,), (1,))
        ),
        "a storage of another name": state(bias=tensor(storage("9", 4, old=old), (4,), (1,))),
        "a view of 2^60 numbers": view((1 << 30, 1 << 30), (0, 0)),
        "a view beyond its storage": view((4,), (2,)),
        "a view from beyond its storage": view((4,), (1,), offset=1 << 40),
        "a view from before its storage": view((4,), (1,), offset=-4),
        "a view of negative strides": view((4,), (-1,)),
        "a view of many dimensions": view((1,) * 70, (1,) * 70),
        "a view of a huge product": view((0, *(1 << 62,) * 7), (1,) * 8),
        "a list": b"\x80\x02](" + tensor(fine, (4,), (1,)) + b"e.",
        "nothing": b"\x80\x02N.",
        "an empty stack": b"\x80\x02.",
        "a mark without end": b"\x80\x02((((.",
        "a memo that is not there": b"\x80\x02h\x63.",
        "os.system": state(bias=b"cos\nsystem\n" + text("touch ran") + b"\x85R"),
        "posix.system by another way": state(
            bias=b"\x8c\x05posix\x8c\x06system\x93" + text("touch ran") + b"\x85R"
        ),
        "an instance": b"\x80\x02(ios\nsystem\n" + text("touch ran") + b"t.",
        "a setter": state(bias=tensor(fine, (4,), (1,)) + b"}" + text("data") + b"Nsb"),
    }


def _archive(*entries: Entry, body: bytes) -> bytes:
    return zip_of(Entry("x/data.pkl", body), Entry("x/version", b"3\n"), *entries)


def pickled(old: bool) -> dict[str, bytes]:
    """Files with these pickles, and one with an honest pickle."""
    honest = state(bias=tensor(storage("0", 4, old=old), (4,), (1,)))
    bodies = {"honest": honest} | _bodies(old)
    if not old:
        return {n: _archive(Entry("x/data/0", bytes(16)), body=b) for n, b in bodies.items()}
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    end = b"\x80\x02](" + text("0") + b"e." + (4).to_bytes(8, "little") + bytes(16)
    return {name: start + body + end for name, body in bodies.items()}


def _hostile_pickles(file: str, old: bool) -> Iterator[Made]:
    return cases(file, {n: c for n, c in pickled(old).items() if n != "honest"})


def PT(file: str, whole: bytes) -> Iterator[Made]:
    four = Entry("x/data/0", bytes(16))
    true = entries_of(whole)
    body = state(bias=_VECTOR)
    squeezed = zeros(1024)
    pickled = next(e for e in true if e.name.endswith("data.pkl"))
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in true:
            archive.writestr(entry.name, entry.data)
    yield from cases(file, with_code())
    yield from _hostile_pickles(file, old=False)
    yield from cases(
        file,
        {
            "deflated": deflated.getvalue(),
            "a gigabyte of deflated zeros": _archive(
                Entry("x/data/0", squeezed, DEFLATED, 1 << 30), body=body
            ),
            "a stored entry with two sizes": _archive(
                Entry("x/data/0", bytes(16), size=1 << 30), body=body
            ),
            "500 names for one entry": _archive(
                four, *(Entry(f"x/data/{i}", bytes(16), at=0) for i in range(1, 500)), body=body
            ),
            "60,000 entries": _archive(
                *(Entry(f"x/data/{i}", b"", at=0) for i in range(60_000)), body=body
            ),
            "a name that leads away": _archive(four, Entry("x/../../y", b""), body=body),
            "names that differ in case": _archive(four, Entry("X/DATA/0", bytes(16)), body=body),
            "no storage": _archive(body=body),
            "a storage that is too short": _archive(Entry("x/data/0", bytes(15)), body=body),
            "no pickle": zip_of(Entry("x/version", b"3\n"), four),
            "no entries": zip_of(),
            "a pickle of 2 MiB": _archive(four, body=body + bytes(2 << 20)),
            "a version of 2 MiB": zip_of(
                Entry("x/data.pkl", body), Entry("x/version", b"3" * (2 << 20)), four
            ),
            "TorchScript": zip_of(*true, Entry(pickled.name.replace("data.", "constants."), b"")),
            "an odd byte order": _archive(four, Entry("x/byteorder", b"middle"), body=body),
            "an odd alignment": _archive(four, Entry("x/.storage_alignment", b"x"), body=body),
            "bytes before it": zip_of(*true, before=b"PK\3\4" * 9),
        },
    )


def OLD_PT(file: str, whole: bytes) -> Iterator[Made]:
    start = whole[:137]  # three pickles that are in every such file
    keys = b"\x80\x02](" + text("0") + b"e."
    numbers = (4).to_bytes(8, "little") + bytes(16)
    body = state(bias=tensor(storage("0", 4, old=True), (4,), (1,)))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    yield from cases(file, with_code())
    yield from _hostile_pickles(file, old=True)
    pairs = b"".join(b"q\x01h\x01\x86" for _ in range(60))
    yield from cases(
        file,
        {
            "a .tar file": tar.getvalue(),
            "a storage that claims 2^62 numbers in the file": start
            + body
            + keys
            + (1 << 62).to_bytes(8, "little")
            + bytes(16),
            "a storage that claims -1 numbers in the file": start
            + body
            + keys
            + b"\xff" * 8
            + bytes(16),
            "storages of nobody": start + body + b"\x80\x02](" + text("7") + b"e." + numbers,
            "the same storage twice": start
            + body
            + b"\x80\x02]("
            + text("0") * 2
            + b"e."
            + numbers * 2,
            "no storages": start + body + b"\x80\x02]." + numbers,
            "storages that compare for ever": start
            + body
            + b"\x80\x02]()"
            + pairs
            + b")"
            + pairs
            + b"e."
            + numbers,
            "another magic number": b"\x80\x02" + number(7) + b"." + whole[15:],
        },
    )
