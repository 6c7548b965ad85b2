"""The planner's error on steps that it has not seen: ``python -m benchmarks.plan_check``.

Measures FusedStep on this machine's CPU at a spread of shapes, by the harness of ``sae-kernels
bench``, fits the planner's rates to one half of them and predicts the other.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from benchmarks.study import parser
from sae_kernels.bench.cases import Shape, step
from sae_kernels.bench.plan import calibration, device
from sae_kernels.bench.providers import chosen
from sae_kernels.bench.results import Results
from sae_kernels.bench.run import BenchSettings, measure

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
TOLERANCE = 0.3  # of the planner's promise
_BUDGET_S = 3600.0


class Checked(NamedTuple):
    """A step that the fit has not seen."""

    case: str
    dtype: str
    seconds: float
    predicted: float

    @property
    def error(self) -> float:
        """Error of the prediction, relative to what was measured."""
        return self.predicted / self.seconds - 1


def checked(seen: Results, unseen: Results) -> list[Checked]:
    """Predictions of one half from a fit to the other."""
    cpu = device("cpu")
    rates = calibration.fit(calibration.observations(seen, cpu), cpu.rates)
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
    middle, verdict = statistics.median(errors), "NOT " * (max(errors) > TOLERANCE)
    last = f"worst {max(errors):.0%}, median {middle:.0%}: {verdict}within {TOLERANCE:.0%}"
    return "\n".join([*lines, last])


def main() -> int:
    """Measures, checks and, with --out, stores; 1 if the promise is not kept."""
    options = parser(__doc__, rounds=7, threads=torch.get_num_threads()).parse_args()
    torch.set_num_threads(options.threads)
    ours = [provider for provider in chosen([], "cpu") if provider.name == "ours"]
    settings = BenchSettings(threads=options.threads, rounds=options.rounds, budget_s=_BUDGET_S)
    cases = [step(shape, "uniform") for shape in (*SEEN, *UNSEEN)]
    command = "python -m benchmarks.plan_check"
    results, ended = measure(cases, ours, settings, options.out, command=command)
    if ended is not None:
        return 130
    half, records = len(SEEN) * len(ours), results.records
    found = checked(*(Results(results.provenance, r) for r in (records[:half], records[half:])))
    print(report(found))
    return int(max(abs(check.error) for check in found) > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
