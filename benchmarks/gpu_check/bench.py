"""Common to all measurements: the device, shapes, backends, times, records and rates."""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import calls
from sae_kernels.bench.cases import GPU_YARDSTICKS, Shape
from sae_kernels.bench.contestants.clock import Clock, CudaClock, PeakMemory
from sae_kernels.bench.timing import interleaved
from sae_kernels.bench.work import Rates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Record = dict[str, Any]
_TINY = Shape(17, 64, 320, 5)  # one token more than the kernels of few take
# Elements of W that compile to the same kernels as more. Tokens are all there, for their number is
# in kernels, and so are gpu-small's latents, whose number decides of an expert's lists.
_COMPILED_ELEMENTS = 65536 * 768
_MEMORY_BYTES = 4 << 30
_L2_TABLE_BYTES = 24 << 20  # well inside the L2 cache of an A100, a H100 and later ones


class Times(NamedTuple):
    """Device times of a contestant, and the host's time to queue it, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    host_ms: float


class SleepingClock(CudaClock):
    """A CudaClock whose device sleeps before each run until the host has queued all of it.

    So the host's launches are not in the time, however short the kernels are.
    """

    _CYCLES_PER_MS = 2_000_000  # of a clock of 2 GHz; a slower one sleeps longer

    def __init__(self, device: torch.device, host_ms: float) -> None:
        super().__init__(device)
        self._cycles = int(2 * host_ms * self._CYCLES_PER_MS)

    def start(self) -> None:
        """Queues the emptying of the cache, the sleep and the first event."""
        torch.cuda.synchronize()  # runs queued before would let the host fall behind
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        torch.cuda._sleep(self._cycles)
        self._begin.record()


class Bench(NamedTuple):
    """Where measurements run.

    Attributes:
        device: the GPU, or the CPU.
        dry: whether only the motions are gone through, on tiny shapes.
        compiling: whether kernels are compiled and not run (`warm`): fewer latents will do.
    """

    device: torch.device
    dry: bool = False
    compiling: bool = False

    @property
    def small(self) -> bool:
        """Whether times and results mean nothing here."""
        return self.dry or self.compiling

    def shape(self, name: str) -> Shape:
        """A yardstick, or what stands for it."""
        return self.cut(GPU_YARDSTICKS[name])

    def cut(self, shape: Shape) -> Shape:
        """The shape itself; a tiny one in a dry run; one that compiles to the same kernels."""
        if self.dry:
            return _TINY
        if not self.compiling:
            return shape
        F = _COMPILED_ELEMENTS // shape.D // 4096 * 4096
        return shape._replace(F=min(shape.F, F))

    def inputs(self, primitive: str, shape: Shape, **options: Any) -> tuple[Any, ...]:
        """Arguments of a primitive on the device."""
        return calls.arguments(primitive, shape, device=self.device, **options)

    def runs(
        self, primitive: str, inputs: tuple[Any, ...], wanted: Sequence[str] = calls.GPU_BACKENDS
    ) -> dict[str, Callable[[], Any]]:
        """The call on each of these backends that can make it."""
        return {
            name: functools.partial(calls.implementation(primitive, name).run, *inputs)
            for name in calls.runnable(primitive, inputs, wanted)
        }

    @torch.no_grad()
    def time(
        self, contestants: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 3
    ) -> dict[str, Times]:
        """Interleaved timings: the device's without the host's launches, and the host's."""
        if self.small:
            rounds, warmup = 1, 0
        for run in list(contestants.values()) * warmup:  # the first call compiles
            run()
        host = {name: self._host_ms(run, rounds // 3) for name, run in contestants.items()}
        clock = SleepingClock(self.device, max(host.values())) if self._on_gpu else Clock()
        found = interleaved(contestants, rounds, clock, warmup=min(1, warmup))
        return {name: Times(*timing, host[name]) for name, timing in found.items()}

    def _host_ms(self, run: Callable[[], object], runs: int) -> float:
        """Median milliseconds in which the host queues a run, on an idle device; 0 on the CPU."""
        taken = [0.0] if not self._on_gpu else []
        for _ in range(runs if self._on_gpu else 0):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(taken)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """The most memory that a call takes on top of what was there; unknown on the CPU."""
        if self.device.type != "cuda":
            run()
            return None
        peak = PeakMemory(self.device)
        peak.start()
        run()
        return peak.stop()


def compared(
    case: str, kernel: str, times: dict[str, Times], base: str, **facts: Any
) -> list[Record]:
    """A record per contestant, each with its ratio to the base."""
    return [
        {
            "kind": "time",
            "case": case,
            "kernel": kernel,
            "provider": name,
            **{key: round(value, 4) for key, value in timing._asdict().items()},
            "ratio": round(timing.median_ms / times[base].median_ms, 3),
            "base": base,
            **facts,
        }
        for name, timing in times.items()
    ]


def check(what: str, kernel: str, backend: str, different: int) -> Record:
    """A record of something that must not differ, with how often it did."""
    found = {"what": what, "kernel": kernel, "backend": backend, "different": different}
    return {"kind": "check", **found, "ok": not different}


@functools.cache
def rates(bench: Bench) -> Rates:
    """The device's bandwidths, measured once a process."""
    size = 1 << 16 if bench.small else _MEMORY_BYTES
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    copy = bench.time({"copy": lambda: target.copy_(source)})["copy"]
    fastest = max(gather_rate(bench, width) for width in (1536, 4608))
    l2_bytes = 1 << 20
    if bench.device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(bench.device).L2_cache_size
    return Rates(2e3 * size / copy.median_ms, fastest, l2_bytes)


def gather_rate(bench: Bench, row_bytes: int) -> float:
    """Bytes per second of reading rows of bf16 at random out of a table that stays in L2."""
    from benchmarks.gpu_check.gather import gather_sum

    D = row_bytes // 2
    rows = (1 << 14 if bench.small else _L2_TABLE_BYTES) // row_bytes
    tokens, K = (2, 16) if bench.dry else (8192, 64)
    table = calls.unit_rows(rows, D, torch.bfloat16).to(bench.device)
    indices = torch.randint(rows, (tokens, K), dtype=torch.int32, device=bench.device)
    out = torch.empty(tokens, D, device=bench.device)
    # Not from an emptied cache as all else: what the cache gives is the question. Many in a row.
    repeats = 2 if bench.small else 20
    gathers = {"gather": lambda: [gather_sum(table, indices, out) for _ in range(repeats)]}
    median_ms = bench.time(gathers)["gather"].median_ms
    return repeats * tokens * K * row_bytes * 1e3 / median_ms
