"""The cost of data from disk: ``python -m benchmarks.data_path [--only step] [--out FILE]``.

``step``: TopK steps at cpu-small on batches of a data set on disk, made by the loop itself or
ahead by a thread, over the same steps on batches that lie ready in memory; all in one process, 16
steps each in turn. (Two of 16 batches a thread makes while others have their turn.) ``warm`` data
are in the page cache, ``cold`` data are dropped from it before each turn. ``large``: seconds to
open 100 GB of shards that are holes, and how the memory of the process grows while rows of 20 GB
of them go by.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.study import B, D, F, K, Records, Runs, fused, parser, record, report
from sae_kernels.bench.inputs import activations
from sae_kernels.bench.timing import interleaved
from sae_kernels.data import Prefetched, ShardDataset, ShardWriter, ShuffledBatches
from sae_kernels.data.shard_index import Index, Shard
from sae_kernels.nn import TopKConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from sae_kernels.step import FusedStep

WINDOW = 65536  # rows, as ShuffledBatches makes them
TURN = 16  # steps


def step(options: argparse.Namespace) -> Records:
    """Steps on data from disk over steps on batches in memory."""
    x, W = activations("zipf", WINDOW, D, F, K)
    ours = fused(TopKConfig(D, F, K), W, compute="auto")
    ready = list(ShuffledBatches(x, B, epochs=1))[:TURN]
    with tempfile.TemporaryDirectory(dir=options.data) as base:
        runs: Runs = {"memory": partial(turn, ours, ready)}
        threads = []
        for name in ("warm", "cold"):
            folder = Path(base, name)
            with ShardWriter(folder, D, rows_per_shard=16384) as writer:
                for _ in range(options.windows):
                    writer.write(x)
            plain = ShuffledBatches(ShardDataset(folder), B, reuse=True)  # as the trainer has it
            threads.append(ahead := Prefetched(ShuffledBatches(ShardDataset(folder), B)))
            drops = folder if name == "cold" else None
            runs[f"disk, {name}"] = partial(turn, ours, plain, drops)
            runs[f"disk, thread, {name}"] = partial(turn, ours, ahead, drops)
        for name, timing in (times := interleaved(runs, options.rounds)).items():
            each = {"steps": TURN, "windows": options.windows}
            yield record("step", name, timing, times["memory"], "memory") | each
        for ahead in threads:
            ahead.close()


def turn(ours: FusedStep, batches: Iterable[torch.Tensor], drops: Path | None = None) -> None:
    """Some steps; a folder's files are dropped from the page cache first if one is given."""
    for path in () if drops is None else drops.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)  # pages that are mapped stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    for x in islice(batches, TURN):
        ours(x, lr=1e-4)


def large(options: argparse.Namespace) -> Records:
    """Opening 100 GB, and memory while 20 GB stream by."""
    with tempfile.TemporaryDirectory(dir=options.data) as base:
        folder = Path(base)
        sparse_data_set(folder, shards=400, d_in=D, shard_bytes=256 << 20)
        start = time.perf_counter()
        data = ShardDataset(folder)
        opened = time.perf_counter() - start
        batches = ShuffledBatches(data, B)
        for _ in range(2 * WINDOW // B + 1):  # both windows are there
            next(batches)
        most = before = resident_bytes()
        count = int(options.gigabytes * 1e9) // (4 * B * D)
        moments = [time.perf_counter()]
        for _ in range(count):
            next(batches)
            moments.append(time.perf_counter())
            most = max(most, resident_bytes())
        slowest = max(b - a for a, b in itertools.pairwise(moments))
        yield {
            "case": "large",
            "bytes": data.n_tokens * D * 4,
            "shards": 400,
            "open_seconds": round(opened, 4),
            "streamed_bytes": count * 4 * B * D,
            "stream_seconds": round(moments[-1] - moments[0], 1),
            "slowest_batch_ms": round(1e3 * slowest, 1),
            "resident_bytes_before": before,
            "resident_bytes_growth": most - before,
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def resident_bytes() -> int:
    """Memory of this process, the pages of mapped files among it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def sparse_data_set(folder: Path, shards: int, d_in: int, shard_bytes: int) -> None:
    """A data set of fp32 zeros whose files hold nothing but their headers."""
    count = shard_bytes // (4 * d_in)
    entry = {"dtype": "F32", "shape": [count, d_in], "data_offsets": [0, 4 * count * d_in]}
    header = json.dumps({"activations": entry}).encode()
    header += b" " * (-len(header) % 8)
    size = 8 + len(header) + 4 * count * d_in
    listed = []
    for i in range(shards):
        path = folder / f"shard_{i:05d}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, size)
        listed.append(Shard(path.name, count, size, ""))
    Index(d_in, torch.float32, ("activations",), {}, tuple(listed)).write(folder)


CASES = {"step": step, "large": large}


def main() -> None:
    """Prints a JSON line per result and, with --out, writes them to a file."""
    made = parser(__doc__, rounds=7, windows=4, gigabytes=20.0, threads=2)
    made.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--data", type=Path, help="where to put the data; default: as tempfile")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    report("data_path", (r for name in options.only for r in CASES[name](options)), options.out)


if __name__ == "__main__":
    main()
