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

    # Seconds, asked for once all runs are queued: asking at once would stop the device each time.
    Reading = Callable[[], float]
    Clock = Callable[[Callable[[], object]], Reading]


_ASKED = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "ecc.mode.current",
    "mig.mode.current",
)


class Timing(NamedTuple):
    """Milliseconds of one contestant."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def wall_clock(run: Callable[[], object]) -> Reading:
    """Runs on the CPU, by the machine's clock."""
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return lambda: seconds


def cuda_clock(device: torch.device, flushed_bytes: int = 512 << 20) -> Clock:
    """Runs on a GPU, by its own events, with nothing of an earlier run left in its L2 cache.

    Writing the large buffer empties the cache, and takes the device long enough for the host to
    have queued the run by the time it starts: what is measured is the device and not the launch,
    unless a run is shorter than its own launches.
    """
    flushed = torch.empty(flushed_bytes, dtype=torch.int8, device=device)

    def clock(run: Callable[[], object]) -> Reading:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        run()
        end.record()

        def reading() -> float:
            end.synchronize()
            milliseconds: float = start.elapsed_time(end)
            return milliseconds / 1e3

        return reading

    return clock


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return cuda_clock(device) if device.type == "cuda" else wall_clock


def interleaved(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    clock: Clock = wall_clock,
    warmup: int = 1,
) -> dict[str, Timing]:
    """Times each contestant once a round, after rounds of warm-up."""
    names = list(contestants)
    readings: dict[str, list[Reading]] = {name: [] for name in names}
    for round_ in range(warmup + rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            reading = clock(contestants[name])
            if round_ >= warmup:
                readings[name].append(reading)
    return {name: _summary([read() for read in taken]) for name, taken in readings.items()}


def _summary(seconds: list[float]) -> Timing:
    ms = sorted(1e3 * s for s in seconds)
    return Timing(statistics.median(ms), ms[len(ms) // 5], ms[-1 - len(ms) // 5])


def provenance(command: str = "benchmarks.cpu_bars") -> dict[str, object]:
    """Where and how a result was measured."""
    commit = _git("rev-parse", "--short", "HEAD") or None  # None in a copy without its .git
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": machine.cpu_model(),
        "isa": cpu.isa(),
        "threads": torch.get_num_threads(),
        **machine.versions(),
        "commit": commit,
        "dirty": bool(changes) if commit else None,
        "malloc": os.environ.get("GLIBC_TUNABLES") or os.environ.get("LD_PRELOAD") or "default",
        "command": " ".join(["python", "-m", command, *_arguments()]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def gpu_provenance(device: torch.device) -> dict[str, object]:
    """The GPU, its driver, and the clocks and limits it runs at just now."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "nvidia_smi": nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str]:
    """What the driver says about the first GPU; empty without the program."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return {}
    first = done.stdout.partition("\n")[0].split(", ")
    return dict(zip(_ASKED, first, strict=False))


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
