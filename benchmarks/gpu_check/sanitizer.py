"""NVIDIA's compute-sanitizer over the kernels, one at a time: accesses out of bounds, and races."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import calls
from benchmarks.gpu_check import journal
from benchmarks.gpu_check.processes import end, said
from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu_check.bench import Record
    from benchmarks.gpu_check.processes import Place

_FOUND_ERRORS = 86
_LIMIT_S, _LEAST_S = 90, 20
_USUAL = Path("/usr/local/cuda/bin/compute-sanitizer")
# Torch's allocator hands out parts of large blocks: what lies past a tensor would still be inside.
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def kernels() -> list[tuple[str, str, str]]:
    """Tool, primitive and backend: select_topk first, whose lists are written by atomics."""
    every = sorted(calls.kernels(), key=lambda kernel: kernel[0] != "select_topk")
    return [(tool, *kernel) for tool in ("memcheck", "racecheck") for kernel in every]


def first(place: Place) -> Iterator[Record]:
    """Both tools over select_topk."""
    return _watched([each for each in kernels() if each[1] == "select_topk"], place)


def rest(place: Place) -> Iterator[Record]:
    """Both tools over the other kernels."""
    return _watched([each for each in kernels() if each[1] != "select_topk"], place)


def _watched(chosen: list[tuple[str, str, str]], place: Place) -> Iterator[Record]:
    program = shutil.which("compute-sanitizer") or (str(_USUAL) if _USUAL.exists() else None)
    names = {" ".join(each): each for each in chosen}
    for name in place.todo(list(names)):
        if place.dry or program is None:
            why = "no GPU here" if place.dry else "compute-sanitizer is not installed"
            yield journal.done(name, "not available", 0, why)
        elif place.left() < _LEAST_S:
            yield journal.done(name, "no time", 0, f"{place.left():.0f} s are left")
        else:
            yield from _run(name, program, *names[name], place)


def _run(
    name: str, program: str, tool: str, primitive: str, backend: str, place: Place
) -> Iterator[Record]:
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND_ERRORS), sys.executable]
    command += ["-m", "benchmarks.gpu_check.oracles", primitive, backend]
    log, begin, left = place.log(name), time.monotonic(), place.left()
    with log.open("w") as output:
        process = subprocess.Popen(
            tied(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**place.environment(), **_ENVIRONMENT},
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(min(_LIMIT_S, left))
        except subprocess.TimeoutExpired:
            end(process)
            status = None
    seconds = time.monotonic() - begin
    found = {"kind": "sanitized", "what": tool, "task": name, "kernel": primitive}
    if status is None and left < _LIMIT_S:
        yield journal.done(name, "no time", seconds)
        return
    ok = {0: True, _FOUND_ERRORS: False}.get(-1 if status is None else status)
    how = f"ended with {status}" if status is not None else f"stopped after {seconds:.0f} s"
    why = "" if ok else f"{how}; it said: {said(log)}"
    yield {**found, "backend": backend, "ok": ok, "why": why}
    yield journal.done(name, "passed" if ok else "failed", seconds, why)
