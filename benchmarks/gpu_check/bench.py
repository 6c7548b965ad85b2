"""What measurements share: the device, shapes, backends, records and rates."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import calls
from sae_kernels.bench.cases import GPU_YARDSTICKS, Shape
from sae_kernels.bench.contestants.clock import PeakMemory, clock_of
from sae_kernels.bench.timing import Timing, interleaved
from sae_kernels.bench.work import Rates

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Record = dict[str, Any]
_TINY = Shape(64, 32, 512, 8)
_MEMORY_BYTES = 4 << 30
_L2_TABLE_BYTES = 24 << 20  # well inside the L2 cache of an A100, a H100 and later ones


class Bench(NamedTuple):
    """Where measurements run.

    Attributes:
        device: the GPU, or the CPU for a dry run.
        dry: whether only the motions are gone through, on tiny shapes.
    """

    device: torch.device
    dry: bool

    def shape(self, name: str) -> Shape:
        """A yardstick, or what stands for it in a dry run."""
        return self.cut(GPU_YARDSTICKS[name])

    def cut(self, shape: Shape) -> Shape:
        """The shape itself, or a tiny one in a dry run."""
        return _TINY if self.dry else shape

    def inputs(self, primitive: str, shape: Shape, **options: Any) -> tuple[Any, ...]:
        """Arguments of a primitive on the device."""
        return calls.arguments(primitive, shape, device=self.device, **options)

    def runs(
        self, primitive: str, inputs: tuple[Any, ...], wanted: Sequence[str] = calls.GPU_BACKENDS
    ) -> dict[str, Callable[[], Any]]:
        """The call on each of these backends that can make it; on the host's in a dry run."""
        return {
            name: functools.partial(calls.implementation(primitive, name).run, *inputs)
            for name in calls.runnable(primitive, inputs, ("cpu",) if self.dry else wanted)
        }

    @torch.no_grad()
    def time(
        self, contestants: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 3
    ) -> dict[str, Timing]:
        """Interleaved timings, with the device's clock."""
        if self.dry:
            rounds, warmup = 2, 1
        return interleaved(contestants, rounds, clock_of(self.device), warmup)

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
    case: str, kernel: str, times: dict[str, Timing], base: str, **facts: Any
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
    size = 1 << 16 if bench.dry else _MEMORY_BYTES
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
    D = row_bytes // 2
    rows = (1 << 14 if bench.dry else _L2_TABLE_BYTES) // row_bytes
    tokens, K = (64, 8) if bench.dry else (8192, 64)
    table = calls.unit_rows(rows, D, torch.bfloat16).to(bench.device)
    indices = torch.randint(rows, (tokens, K), dtype=torch.int32, device=bench.device)
    out = torch.empty(tokens, D, device=bench.device)
    if bench.dry:
        long = indices.long()

        def gather() -> object:
            return torch.nn.functional.embedding_bag(long, table, mode="sum")
    else:
        from benchmarks.gpu_check.gather import gather_sum

        def gather() -> object:
            return gather_sum(table, indices, out)

    # Not from an emptied cache as all else: what the cache gives is the question. Many in a row.
    repeats = 2 if bench.dry else 20
    timing = bench.time({"gather": lambda: [gather() for _ in range(repeats)]})["gather"]
    return repeats * tokens * K * row_bytes * 1e3 / timing.median_ms
