"""One task in a process of its own: ``python -m benchmarks.gpu_check.worker``.

It imports everything, then waits for a line that says which task to run and which file to write its
records to. So the next process is ready while one still measures, and what a kernel does to its
process, an illegal access or an endless loop, is over with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_check import dry_run, warm
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.tasks import TASKS

if TYPE_CHECKING:
    from benchmarks.gpu_check.bench import Record


def main() -> None:
    """Runs what standard input says; ends without a word where that is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    dry = parser.parse_args().dry_run
    with contextlib.ExitStack() as stack:
        if dry:
            torch.set_num_threads(1)
            stack.enter_context(dry_run.emulated())
        line = sys.stdin.readline()
        if line:
            order = json.loads(line)
            work(order["task"], Path(order["records"]), dry)


def work(name: str, path: Path, dry: bool) -> None:
    """The records of a task, a line each, and one about the kernels that it loaded."""
    torch.manual_seed(0)
    with path.open("w") as file, warm.counted() as loads:

        def write(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        write({"kind": "began"})  # its time runs from here
        for record in TASKS[name].run(Bench(torch.device("cpu" if dry else "cuda"), dry)):
            write(record)
        if not dry:
            torch.cuda.synchronize()  # a failure shows in the task that caused it
        write({"kind": "kernels", "cached": loads.hits, "compiled": loads.misses})


if __name__ == "__main__":
    main()
