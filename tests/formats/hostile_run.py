"""Reads the corpus in a process of its own, as ``python hostile_run.py FOLDER FLIPS``.

A line of JSON a case: what came of it, the processor time, and how much the process has grown. The
address space is limited: what asks for far more than a file has dies of it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hostile import FORMATS, Case, corpus

from sae_kernels import nn
from sae_kernels.errors import DataError
from sae_kernels.formats import read

_MIB = 1 << 20
MEMORY = 1024 * _MIB


def load(format: str, folder: Path) -> dict[str, torch.Tensor]:
    """The SAE's tensors."""
    format = format.split(",")[0]  # what follows says which of its files
    if format == "native":
        return nn.SparseAutoencoder.from_pretrained(folder).state_dict()
    weights = read(folder, format)
    return nn.from_weights(weights.config, weights.tensors).state_dict()


def outcome(format: str, folder: Path) -> tuple[str, str]:
    """What came of reading: "read", "refused", or what must never be."""
    try:
        tensors = load(format, folder)
    except DataError as error:
        return "refused", str(error)
    except BaseException as error:
        return type(error).__name__, str(error)[:500]
    finite = all(tensor.isfinite().all() for tensor in tensors.values())
    return ("read", "") if finite else ("not finite", "")


def restore(folder: Path, files: dict[str, bytes]) -> None:
    """Makes the folder honest again; files are written over, which is quicker than new ones."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.is_symlink() or not path.is_file() or path.name not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def measured(case: Case, folder: Path) -> dict[str, Any]:
    case.damage(folder)
    _forget_peak()
    before, start = _status("VmRSS"), time.process_time()
    signal.alarm(20)  # a pipe that nobody writes to
    came, message = outcome(case.format, folder)
    signal.alarm(0)
    if any(Path(place, "ran").exists() for place in (".", folder)):
        came = "ran code"
    return {
        "case": f"{case.format}: {case.name}",
        "must_fail": case.must_fail,
        "came": came,
        "message": message,
        "seconds": time.process_time() - start,
        "grown": (_status("VmHWM") - before) // _MIB,
    }


def _forget_peak() -> None:
    """The largest memory so far is that of now: what made the case does not count."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """Bytes that the kernel counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(place: Path, flips: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(place)
    for format, (make, *_) in FORMATS.items():
        honest, folder = place / "honest", place / "folder"
        make(honest)
        assert outcome(format, honest) == ("read", ""), format
        if format == next(iter(FORMATS)):
            _limit()
        files = {path.name: path.read_bytes() for path in honest.iterdir()}
        folder.mkdir()
        for case in corpus(format, honest, flips):
            restore(folder, files)
            print(json.dumps(measured(case, folder)), flush=True)
        shutil.rmtree(honest)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
