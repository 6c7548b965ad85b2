"""NVIDIA's compute-sanitizer over every kernel: reads and writes out of bounds, and races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu_check.bench import Record

_TOOLS = ("memcheck", "racecheck")
_SCRIPT = [sys.executable, "-m", "benchmarks.gpu_check.every_kernel"]
_FOUND_ERRORS = 86
_USUAL = Path("/usr/local/cuda/bin/compute-sanitizer")
# Torch's allocator hands out parts of large blocks: what lies past a tensor would still be inside.
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def sanitized(dry: bool, seconds: float) -> Iterator[Record]:
    """A record per tool; without a GPU the script runs bare."""
    program = shutil.which("compute-sanitizer") or (str(_USUAL) if _USUAL.exists() else None)
    deadline = time.monotonic() + seconds
    if dry or program is None:
        why = "no GPU here" if dry else "compute-sanitizer is not installed"
        yield {"kind": "not available", "what": "compute-sanitizer", "why": why}
        yield _run("every kernel, bare", _SCRIPT, deadline)
        return
    for i, tool in enumerate(_TOOLS):
        share = time.monotonic() + (deadline - time.monotonic()) / (len(_TOOLS) - i)
        watched = [program, "--tool", tool, "--error-exitcode", str(_FOUND_ERRORS)]
        yield _run(tool, watched + _SCRIPT, share)


def _run(what: str, command: list[str], deadline: float) -> Record:
    try:
        done = subprocess.run(
            tied(command),
            capture_output=True,
            text=True,
            timeout=max(0.0, deadline - time.monotonic()),
            env={**os.environ, **_ENVIRONMENT},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        lines = _kernels(error.stdout.decode() if error.stdout else "")
        why = f"stopped when its time was up, after {len(lines)} kernels"
        return {"kind": "sanitized", "what": what, "finished": False, "ok": None, "why": why}
    text = done.stdout + done.stderr
    return {
        "kind": "sanitized",
        "what": what,
        "finished": done.returncode in (0, _FOUND_ERRORS),
        "ok": done.returncode == 0,
        "kernels": _kernels(done.stdout),
        "why": text[-1500:] if done.returncode else "",
    }


def _kernels(text: str) -> list[str]:
    """The kernels that the script named, tool's own lines left out."""
    lines = [line for line in text.splitlines() if line and not line.startswith("=")]
    return sorted({" ".join(line.split()[:2]) for line in lines})
