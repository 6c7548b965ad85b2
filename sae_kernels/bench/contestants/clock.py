"""Measuring the time, peak memory and phases of work on a device."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    # Seconds, asked for once all runs are queued: asking at once would stop the device each time.
    Reading = Callable[[], float]


class Clock:
    """Measures the time from a start to a stop: here by the machine's clock, for the CPU."""

    def start(self) -> None:
        """Notes the time."""
        self._start = time.perf_counter()

    def stop(self) -> Reading:
        """Ends it: the seconds since the start, which may be asked for later."""
        seconds = time.perf_counter() - self._start
        return lambda: seconds


class CudaClock(Clock):
    """GPU time from CUDA events, after emptying the L2 cache.

    Writing the large buffer empties the cache, and takes the device long enough for the host to
    have queued the run by the time it starts: what is measured is the device and not the launch,
    unless a run is shorter than its own launches.
    """

    def __init__(self, device: torch.device, flushed_bytes: int = 512 << 20) -> None:
        self._flushed = torch.empty(flushed_bytes, dtype=torch.int8, device=device)

    def start(self) -> None:
        """Queues the emptying of the cache and the first event."""
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        self._begin.record()

    def stop(self) -> Reading:
        """Queues the second event."""
        begin, end = self._begin, self._end
        end.record()

        def reading() -> float:
            end.synchronize()
            milliseconds: float = begin.elapsed_time(end)
            return milliseconds / 1e3

        return reading


def clock_of(device: torch.device) -> Clock:
    """The clock for work on a device."""
    return CudaClock(device) if device.type == "cuda" else Clock()


class PeakMemory:
    """Peak memory above the level at the start, in bytes.

    On a GPU the allocator's; on the CPU the process's high-water mark, after glibc returned free
    memory (Linux; unknown elsewhere).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def start(self) -> None:
        """Notes the memory that is taken now."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        try:
            # Freed memory that the allocator keeps would hide what a run takes of it.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is there now
            self._before = _status("VmRSS")
        except (OSError, AttributeError):
            self._before = -1

    def stop(self) -> int | None:
        """The peak since the start in bytes above it; None if unknown."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before
        return None if self._before < 0 else max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    line = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if line is None:
        raise OSError(f"/proc/self/status: no {name}")
    return int(line.group(1)) * 1024


PHASES = ("product", "selection", "decode", "backward", "optimizer", "other")
# The phase that an operator begins, by how its name begins; of ours, whose fused ones have no torch
# name, the selection is all counted as "product", which it hides behind.
RULES = {
    "Optimizer.step": "optimizer",
    "autograd::engine": "backward",
    **dict.fromkeys(("aten::topk", "aten::sort", "aten::kthvalue", "aten::scatter"), "selection"),
    **dict.fromkeys(("sae_kernels::select_", "sae_kernels::route_"), "product"),
    **dict.fromkeys(("aten::embedding_bag", "sae_kernels::decode"), "decode"),
    **dict.fromkeys(("sae_kernels::code_grad", "sae_kernels::transpose_codes"), "backward"),
    **dict.fromkeys(("sae_kernels::row_grad", "sae_kernels::auxk"), "backward"),
    **dict.fromkeys(("sae_kernels::row_", "sae_kernels::pick_dead"), "optimizer"),
}
_MOST_EVENTS = 100_000
_MULTIPLIES = {"aten::mm", "aten::addmm", "aten::linear", "aten::matmul"}


class Phases:
    """Seconds of one run by phase (:data:`PHASES`), measured by torch's profiler.

    An operator counts where it was called: in the optimizer, in the backward pass, else by what it
    is. A product that reads a [B, F] matrix decodes; the others before the backward pass encode.
    """

    def __init__(self, device: torch.device, n_latents: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._on_gpu, self._n_latents = device.type == "cuda", n_latents
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)

    def start(self) -> None:
        """Begins to record."""
        self._profile.__enter__()
        self._began = time.perf_counter()

    def stop(self) -> dict[str, float] | None:
        """Ends the recording; returns the seconds of each phase, "other" for the rest.

        None of a run of very many operators: reading them would take minutes.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        whole = time.perf_counter() - self._began
        self._profile.__exit__(None, None, None)
        profiler: Any = self._profile.profiler
        if len(profiler.kineto_results.events()) > _MOST_EVENTS:
            return None
        found = dict.fromkeys(PHASES, 0.0)
        for event in self._profile.events() or []:
            phase = self._phase(event)
            if phase is not None and not self._is_inside_another(event):
                time_us = event.device_time_total if self._on_gpu else event.cpu_time_total
                found[phase] += float(time_us) / 1e6
        found["other"] = max(0.0, whole - sum(found.values()))
        return found

    def _is_inside_another(self, event: Any) -> bool:
        above = event.cpu_parent
        while above is not None and self._phase(above) is None:
            above = above.cpu_parent
        return above is not None

    def _phase(self, event: Any) -> str | None:
        if event.name in _MULTIPLIES:
            widths = [shape[1] for shape in event.input_shapes if len(shape) == 2]
            return "decode" if widths[:1] == [self._n_latents] else "product"
        return phase_of(event.name)


def phase_of(operator: str) -> str | None:
    """The phase that an operator's name implies whatever its operands; None if no rule matches.

    >>> phase_of("sae_kernels::row_grad"), phase_of("sae_kernels::row_update")
    ('backward', 'optimizer')
    """
    return next((phase for begin, phase in RULES.items() if operator.startswith(begin)), None)
