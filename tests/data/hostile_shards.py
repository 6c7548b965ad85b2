"""Data sets that somebody damaged or forged; run as a program it opens all of them.

Each case changes a good data set of two shards. What is printed is a JSON object: by case what came
of it and the seconds that took.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

D, N, PER_SHARD = 4, 50, 30
FLIPS = 300
Damage = "Callable[[Path], object]"


def rows() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def write(folder: Path, **options: Any) -> None:
    with ShardWriter(folder, D, rows_per_shard=PER_SHARD, **options) as writer:
        writer.write(rows(), torch.arange(N), torch.arange(N) // 7)


def shard(folder: Path) -> Path:
    return folder / "shard_00000.safetensors"


def reindex(change: Callable[[dict[str, Any]], object]) -> Damage:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "index.json").read_text())
        change(record)
        (folder / "index.json").write_text(json.dumps(record))

    return apply


def shards_are(**values: object) -> Damage:
    """What the index says of the first shard."""
    return reindex(lambda record: record["shards"][0].update(values))


def with_header(header: bytes | dict[str, Any], length: int | None = None) -> Damage:
    """Another header before the same payload, in an index that knows the file's size."""

    def apply(folder: Path) -> None:
        content = shard(folder).read_bytes()
        payload = content[8 + int.from_bytes(content[:8], "little") :]
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        shard(folder).write_bytes(size.to_bytes(8, "little") + text + payload)
        shards_are(bytes=shard(folder).stat().st_size)(folder)

    return apply


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def ids(begin: int) -> dict[str, Any]:
    return entry([PER_SHARD], begin, begin + 4 * PER_SHARD, "I32")


ROWS = 4 * D * PER_SHARD  # bytes
GOOD = {
    "activations": entry([PER_SHARD, D], 0, ROWS),
    "documents": ids(ROWS),
    "tokens": ids(ROWS + 4 * PER_SHARD),
}


def replaced(name: str, by: Callable[[Path], object]) -> Damage:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        by(folder / name)

    return apply


def moved_out(name: str) -> Damage:
    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(folder.parent / "outside")

    return apply


def sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def cut(name: str, sixteenth: int) -> Damage:
    def apply(folder: Path) -> None:
        path = folder / name
        size = path.stat().st_size * sixteenth // 16
        os.truncate(path, size)
        if name != "index.json":
            shards_are(bytes=size)(folder)  # or the size alone would tell

    return apply


CASES: dict[str, Damage] = {
    **{f"shard cut at {i}/16": cut("shard_00000.safetensors", i) for i in range(16)},
    **{f"index cut at {i}/16": cut("index.json", i) for i in range(16)},
    "huge shape": with_header(GOOD | {"activations": entry([1 << 60, D], 0, ROWS)}),
    "shape whose size overflows": with_header(
        GOOD | {"activations": entry([1 << 32, 1 << 32], 0, ROWS)}
    ),
    "negative shape": with_header(GOOD | {"activations": entry([-PER_SHARD, -D], 0, ROWS)}),
    "overlapping offsets": with_header(GOOD | {"documents": ids(ROWS - 4)}),
    "negative offsets": with_header(GOOD | {"activations": entry([PER_SHARD, D], -ROWS, 0)}),
    "offsets past the end": with_header(GOOD | {"tokens": ids(1 << 40)}),
    "backward offsets": with_header(GOOD | {"activations": entry([PER_SHARD, D], ROWS, 0)}),
    "another dtype of the same size": with_header(
        GOOD | {"activations": entry([PER_SHARD, D], 0, ROWS, "I32")}
    ),
    "transposed": with_header(GOOD | {"activations": entry([D, PER_SHARD], 0, ROWS)}),
    "a tensor more": with_header(GOOD | {"more": entry([0], 0, 0)}),
    "deep header": with_header(b'{"a":' * 100_000),
    "header of 2^63 bytes": with_header(b"{}", 1 << 63),
    "header of 2^64 - 1 bytes": with_header(b"{}", (1 << 64) - 1),
    "header of 0 bytes": with_header(b""),
    "header of 90 MB": with_header(json.dumps(GOOD).encode() + b" " * 90_000_000),
    "shard of 1 TiB of nothing": lambda folder: (
        replaced(shard(folder).name, sparse(1 << 40))(folder),
        shards_are(bytes=1 << 40)(folder),
    ),
    "no shard": lambda folder: shard(folder).unlink(),
    "pipe as shard": replaced("shard_00000.safetensors", os.mkfifo),
    "folder as shard": replaced("shard_00000.safetensors", Path.mkdir),
    "device as shard": replaced("shard_00000.safetensors", lambda p: p.symlink_to("/dev/zero")),
    "shard that is a link out": moved_out("shard_00000.safetensors"),
    "shard that links to itself": replaced(
        "shard_00000.safetensors", lambda path: path.symlink_to(path)
    ),
    "pipe as index": replaced("index.json", os.mkfifo),
    "folder as index": replaced("index.json", Path.mkdir),
    "index that is a link out": moved_out("index.json"),
    "index that is an endless device": replaced("index.json", lambda p: p.symlink_to("/dev/zero")),
    "index of 1 GiB": replaced("index.json", sparse(1 << 30)),
    "deep index": lambda folder: (folder / "index.json").write_text('{"a":' * 1_000_000),
    "deep list": lambda folder: (folder / "index.json").write_text("[" * 1_000_000),
    "number of a million digits": lambda folder: (folder / "index.json").write_text(
        '{"count": ' + "9" * 1_000_000 + "}"
    ),
    "counts of 4300 digits": reindex(
        lambda record: (
            record.update(count=10**4299),
            [s.update(count=9 * 10**4299) for s in record["shards"]],
        )
    ),
    "count of 2^62": shards_are(count=1 << 62),
    "bytes below zero": shards_are(bytes=-1),
    "width of 2^62": reindex(lambda record: record.update(d_in=1 << 62)),
    "path up": shards_are(file="../outside"),
    "absolute path": shards_are(file="/etc/passwd"),
    "path of another system": shards_are(file="..\\outside"),
    "drive": shards_are(file="C:outside"),
    "name with a zero": shards_are(file="shard\0"),
    "name without an encoding": shards_are(file="\ud800"),
    "name of 10000 letters": shards_are(file="a" * 10_000),
    "the index as shard": shards_are(file="index.json"),
    "pickle as shard": lambda folder: (
        torch.save({"activations": rows()}, shard(folder)),
        shards_are(bytes=shard(folder).stat().st_size)(folder),
    ),
}


def flips() -> Iterator[tuple[str, Damage]]:
    """Single bits, in headers and anywhere."""
    draw = random.Random(0)
    for i in range(FLIPS):
        name = ("index.json", "shard_00000.safetensors")[i % 2]

        def flip(folder: Path, name: str = name, part: float = draw.random(), i: int = i) -> None:
            content = bytearray((folder / name).read_bytes())
            header = 8 + int.from_bytes(content[:8], "little")
            place = int(part * (header if name != "index.json" and i % 4 == 1 else len(content)))
            content[place] ^= 1 << i % 8
            (folder / name).write_bytes(content)

        yield f"flip {i} in {name}", flip


def outcome(folder: Path, expected: torch.Tensor) -> str:
    """What a reader of a data set sees."""
    try:
        data = ShardDataset(folder, check_on_read=True)
        found = data.rows(0, data.n_tokens)
    except DataError as error:
        return f"DataError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    same = torch.equal(found.activations, expected) and found.tokens is not None
    return "equal" if same and found.tokens.tolist() == list(range(N)) else "different"


def main(case_limit: int) -> None:
    """Opens every case below a limit on the address space."""
    expected = rows()
    outcomes = {}
    with tempfile.TemporaryDirectory() as base:
        good = Path(base, "good")
        write(good)
        folders = {}
        for i, (name, damage) in enumerate((*CASES.items(), *flips())):
            folders[name] = Path(base, str(i), "data")
            shutil.copytree(good, folders[name])
            damage(folders[name])
        assert outcome(good, expected) == "equal"
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + case_limit, used + case_limit))
        for name, folder in folders.items():
            start = time.perf_counter()
            result = outcome(folder, expected)
            outcomes[name] = (result, time.perf_counter() - start)
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
