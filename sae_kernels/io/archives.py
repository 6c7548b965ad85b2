"""Safe opening of untrusted zip files (``.npz`` and ``.pt``): all checks precede any reading.

NumPy or torch, which parse the file next, must see the entries that were checked here. So only the
plain layout that they write is accepted: entries one after the other, the directory, its end
record, and nothing else.
"""

from __future__ import annotations

import struct
import zipfile
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import BinaryIO

MAX_ENTRIES = 1024  # an SAE has a dozen
MAX_DIRECTORY = 1 << 20  # bytes
# Deflated zeros shrink 1,000 times, weights hardly: the most that a file may unpack to.
MAX_RATIO, RATIO_SLACK = 64, 64 << 20
_LOCAL = struct.Struct("<4s22x2H")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")


def open_checked(file: BinaryIO, stored: bool = False) -> zipfile.ZipFile:
    """Opens a zip file after checking its directory: names, layout, sizes, compression.

    Args:
        file: open for reading; nothing of an entry is decompressed.
        stored: no entry may be compressed.

    Raises:
        ValueError, zipfile.BadZipFile: a failed check; the message says which.
    """
    length = file.seek(0, 2)
    start = _directory(file, length)
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    kinds = (zipfile.ZIP_STORED,) if stored else (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    for entry in entries:
        _check_name(entry.filename)
        if entry.flag_bits & 1 or entry.compress_type not in kinds:
            known = "stored" if stored else "stored or deflated"
            raise ValueError(f"{entry.filename!r:.80} is not {known}")
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise ValueError(f"{entry.filename!r:.80} is stored with two sizes")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two entries have one name")
    if (total := sum(entry.file_size for entry in entries)) > MAX_RATIO * length + RATIO_SLACK:
        raise ValueError(f"its {length} bytes claim to unpack to {total}")
    spans = sorted(_span(file, entry) for entry in entries)
    if spans and spans[0][0]:
        raise ValueError("something lies before the first entry")
    if any(end > begin for (_, end), (begin, _) in pairwise([*spans, (start, start)])):
        raise ValueError("entries overlap")
    return archive


def _directory(file: BinaryIO, length: int) -> int:
    """The offset of the directory, whose sizes are checked before it is parsed."""
    file.seek(max(0, length - _END.size - _LOCATOR.size - _END_64.size))
    tail = file.read()
    end = length - _END.size
    if end < 0:
        raise ValueError("too short for a zip file")
    sign, disk, first, here, count, size, start, comment = _END.unpack(tail[-_END.size :])
    if sign != b"PK\5\6" or comment or disk or first or here != count:
        raise ValueError("no end of a zip file's directory where the file ends")
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator.startswith(b"PK\6\7"):
        end -= _LOCATOR.size + _END_64.size
        record = _END_64.unpack(tail[: _END_64.size])
        sign, own, _, _, disk, first, here, count, size, start = record
        _, locator_disk, at, disks = _LOCATOR.unpack(locator)
        # Readers find this record by the locator or by its distance from the end: both must agree.
        sane = sign == b"PK\6\6" and own == _END_64.size - 12 and at == end and here == count
        if not sane or disk or first or locator_disk or disks != 1:
            raise ValueError("damaged end of a zip64 file's directory")
    if start + size != end:
        raise ValueError("the directory does not lie before its end")
    if count > MAX_ENTRIES or size > MAX_DIRECTORY:
        raise ValueError(f"{count} entries, listed in {size} bytes, are too many")
    return int(start)


def _check_name(name: str) -> None:
    """Refuses path-like and unprintable names, which no tensor has (entries are never unpacked)."""
    parts = name.split("/")
    strange = len(name) > 200 or not name.isprintable() or set(name) & set("\\:")
    if strange or {"", ".", ".."} & {*parts}:
        raise ValueError(f"{name!r:.80} is no name of a tensor's entry")


def _span(file: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Start and end of an entry in the file, its local header included."""
    file.seek(entry.header_offset)
    sign, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
    if sign != b"PK\3\4":
        raise ValueError(f"{entry.filename!r:.80} is not where the directory says")
    end = entry.header_offset + _LOCAL.size + name + extra + entry.compress_size
    return entry.header_offset, end
