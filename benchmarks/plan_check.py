"""How well the planner predicts steps that it has not seen: ``python -m benchmarks.plan_check``.

Measures FusedStep on this machine's CPU at a spread of shapes, fits the planner's rates to one half
of them and predicts the other. Each step is timed right after one that is not: in training a step
finds in the caches what its own predecessor left there, and here another one's would be.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.bench.cases import Case, Shape
from sae_kernels.bench.contestants.clock import WallClock
from sae_kernels.bench.plan import calibration, device
from sae_kernels.bench.plan.calibration import fit
from sae_kernels.bench.provenance import provenance
from sae_kernels.bench.results import Results, Writer
from sae_kernels.bench.timing import interleaved
from sae_kernels.config import TrainConfig
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.step import FusedStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sae_kernels.bench.contestants.clock import Clock
    from sae_kernels.bench.results import Record

# Both halves span the range; no shape of one is near a shape of the other.
SEEN = (
    Shape(512, 256, 4096, 16),
    Shape(4096, 1024, 4096, 64),
    Shape(512, 1024, 32768, 32),
    Shape(4096, 256, 32768, 32),
    Shape(2048, 768, 16384, 16),
    Shape(1024, 512, 49152, 64),
)
UNSEEN = (
    Shape(512, 512, 8192, 64),
    Shape(1024, 1024, 8192, 32),
    Shape(2048, 256, 4096, 32),
    Shape(4096, 512, 12288, 16),
    Shape(1024, 768, 24576, 64),
    Shape(512, 384, 49152, 16),
    Shape(2048, 768, 24576, 32),
)
DTYPES = ("bfloat16", "float32")
TOLERANCE = 0.3  # of the planner's promise


class Checked(NamedTuple):
    """A step that the fit has not seen."""

    case: str
    dtype: str
    seconds: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.seconds - 1


def measured(shape: Shape, rounds: int) -> Iterator[Record]:
    """A record a dtype."""
    torch.manual_seed(0)
    x = torch.randn(shape.B, shape.D)
    steps = {dtype: _step(shape, x, dtype) for dtype in DTYPES}
    clock = WallClock()
    twice = {dtype: _twice(step, clock) for dtype, step in steps.items()}
    for dtype, timing in interleaved(twice, rounds, clock).items():
        yield {
            **Case("step", "step", shape, "uniform").facts(),
            **{"provider": "ours", "dtype": dtype, "as_shipped": True},
            **{"status": "measured", "reason": None, "rounds": rounds},
            **{name: round(ms, 4) for name, ms in timing._asdict().items()},
        }


def checked(seen: Results, unseen: Results) -> list[Checked]:
    """Predictions of one half from a fit to the other."""
    cpu = device("cpu")
    rates = fit(calibration.observations(seen, cpu), cpu.rates)
    return [
        Checked(
            record["case"],
            record["dtype"],
            step.seconds,
            sum(amount / rates[unit] for unit, amount in step.amounts.items()),
        )
        for record, step in zip(unseen.records, calibration.observations(unseen, cpu), strict=True)
    ]


def report(found: list[Checked]) -> str:
    """A line a step, then how far off they are."""
    errors = [abs(check.error) for check in found]
    lines = [
        f"{check.case} {check.dtype}: measured {1e3 * check.seconds:.1f} ms, "
        f"predicted {1e3 * check.predicted:.1f} ms ({check.error:+.0%})"
        for check in found
    ]
    verdict = "within" if max(errors) <= TOLERANCE else "NOT within"
    return "\n".join(
        [
            *lines,
            f"worst {max(errors):.0%}, median {statistics.median(errors):.0%}: "
            f"{verdict} {TOLERANCE:.0%}",
        ]
    )


def _step(shape: Shape, x: torch.Tensor, dtype: str) -> Callable[[], object]:
    config = TrainConfig(compute="bfloat16" if dtype == "bfloat16" else "float32", auxk_alpha=0.0)
    step = FusedStep(TopKSAE(TopKConfig(shape.D, shape.F, shape.K)), config)
    return lambda: step(x, lr=1e-4)


def _twice(run: Callable[[], object], clock: Clock) -> Callable[[], object]:
    """Runs twice and has the clock start over in between."""

    def twice() -> None:
        run()
        clock.start()
        run()

    return twice


def main() -> int:
    """Measures, checks and, with --out, stores; 1 if the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = provenance("python -m benchmarks.plan_check")
    halves = []
    for shapes in (SEEN, UNSEEN):
        records = []
        for shape in shapes:
            records += list(measured(shape, options.rounds))
            print(*(f"{r['case']} {r['dtype']}: {r['median_ms']:.1f} ms" for r in records[-2:]))
        halves.append(Results(where, records))
    found = checked(*halves)
    if options.out:
        with Writer(options.out, where) as writer:
            for record in halves[0].records + halves[1].records:
                writer.write(record)
    print(report(found))
    return int(max(abs(check.error) for check in found) > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
