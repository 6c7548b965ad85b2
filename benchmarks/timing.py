"""Interleaved timing: every round runs every contestant once, so that drift hits all alike.

The order rotates from round to round: what one leaves in the caches is not always another's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels import machine
from sae_kernels.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Callable


class Timing(NamedTuple):
    """Milliseconds of one contestant."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def interleaved(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times each contestant once a round, after one round of warm-up."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            contestants[name]()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: _summary(times) for name, times in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    ms = sorted(1e3 * s for s in seconds)
    return Timing(statistics.median(ms), ms[len(ms) // 5], ms[-1 - len(ms) // 5])


def provenance() -> dict[str, object]:
    """Where and how a result was measured."""
    return {
        "cpu": machine.cpu_model(),
        "isa": cpu.isa(),
        "threads": torch.get_num_threads(),
        **machine.versions(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "malloc": os.environ.get("GLIBC_TUNABLES") or os.environ.get("LD_PRELOAD") or "default",
        "command": " ".join(["python", "-m", "benchmarks.cpu_bars", *_arguments()]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _arguments() -> list[str]:
    """The command line without the place of the results, which is this machine's own business."""
    arguments = sys.argv[1:]
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return arguments


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()
