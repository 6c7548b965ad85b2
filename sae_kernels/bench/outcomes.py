"""Outcomes: the measurements of a provider in a case, and the record made of them."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sae_kernels.bench.contestants.contestant import Unable
from sae_kernels.bench.contestants.rates import COPIED_BYTES
from sae_kernels.bench.gate import Deviation, WrongResult
from sae_kernels.bench.timing import Timing, summary
from sae_kernels.bench.work import of_case
from sae_kernels.bench.workers import Failed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.providers import Provider
    from sae_kernels.bench.results import Record


class OutOfTime(Exception):
    """Raised when the budget is used up; says so."""


_STATUS: dict[type[Exception], str] = {
    Unable: "unable", WrongResult: "refused", Failed: "failed", OutOfTime: "skipped",
}  # fmt: skip


@dataclass
class Outcome:
    """The measurements of a provider in a case so far."""

    provider: Provider
    status: str = "measured"  # while it takes part; then "unable", "refused", "failed", "skipped"
    reason: str | None = None  # why it takes no further part
    error: Deviation | None = None  # how far its result was off
    seconds: list[float] = field(default_factory=list)  # of each of its turns
    last: float = 0.0  # seconds of its last run
    peak_bytes: int | None = None  # the most that a run took on top of what was there, if known
    phases: dict[str, float] | None = None  # seconds by phase of one run
    # Of an accelerated library, in its turns: how many calls the kernels took ("taken") and which
    # were left to it ("left") or needed dense codes ("dense").
    calls: dict[str, Counter[str]] = field(default_factory=dict)

    def end(self, status: str, reason: str) -> None:
        """Stops measuring the provider in this case, for a reason."""
        self.status, self.reason = status, reason

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Stops measuring this provider alone if the block finds it unable, failing or wrong."""
        try:
            yield
        except tuple(_STATUS) as error:
            self.end(_STATUS[type(error)], str(error))

    def hear(self, calls: dict[str, dict[str, int]] | None) -> None:
        """Adds what became of an accelerated library's calls in a turn."""
        for kind, counts in (calls or {}).items():
            self.calls.setdefault(kind, Counter()).update(counts)

    @property
    def timing(self) -> Timing | None:
        """The summary of its times; None if it has none or was stopped."""
        return summary(self.seconds) if self.status == "measured" and self.seconds else None


def measured(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes that are still being measured."""
    return [outcome for outcome in outcomes if outcome.status == "measured"]


def records(case: Case, outcomes: list[Outcome], told: list[Outcome]) -> list[Record]:
    """The records of a case's outcomes in ``told``; all outcomes give the times to compare with."""
    times = {o.provider.key: o.timing for o in outcomes}
    ours_shipped = (o for o in outcomes if o.provider.name == "ours" and o.provider.as_shipped)
    shipped = next((o.timing for o in ours_shipped), None)
    found = []
    for outcome in told:
        provider, timing = outcome.provider, outcome.timing
        record: Record = {
            **case.facts(),
            "provider": provider.name,
            "dtype": provider.dtype,
            "as_shipped": provider.as_shipped,
            "status": outcome.status,
            "reason": outcome.reason,
            "rounds": len(outcome.seconds),
            "peak_bytes": outcome.peak_bytes,
            "max_error": outcome.error and outcome.error.error,
            "error_budget": outcome.error and outcome.error.budget,
        }
        if timing is not None:
            record |= _rounded(timing._asdict())
        if timing is not None and provider.operation is None:
            ours, product = (times.get(f"{name} {provider.dtype}") for name in ("ours", "product"))
            record["speedup_of_ours"] = _ratio(timing, ours)
            record["speedup_of_ours_default"] = _ratio(timing, shipped)
            record |= _rates(case, provider.dtype, timing, product, times.get("copy int8"))
            record |= {"phases_ms": _phases(outcome, product)}
        if timing is not None and provider.accelerated:
            alone = times.get(f"{provider.module} {provider.dtype}")
            record["speedup_of_library"] = alone and _ratio(alone, timing)
            record["calls"] = {kind: dict(counts) for kind, counts in outcome.calls.items()}
        found.append(record)
    return found


def _rounded(values: dict[str, float]) -> Record:
    return {name: round(value, 4) for name, value in values.items()}


def _ratio(timing: Timing, base: Timing | None) -> float | None:
    return None if base is None else round(timing.median_ms / base.median_ms, 4)


def _rates(
    case: Case, dtype: str, timing: Timing, product: Timing | None, copy: Timing | None
) -> Record:
    need, seconds = of_case(case, dtype), timing.median_ms / 1e3
    rates: Record = {"gflops": need.flops / seconds / 1e9, "gbps": need.moved / seconds / 1e9}
    if product is not None and copy is not None:
        floor = need.floor_ms(product.median_ms, 2e3 * COPIED_BYTES / copy.median_ms)
        rates |= {"floor_ms": floor, "of_roofline": floor / timing.median_ms}
    return _rounded(rates)


def _phases(outcome: Outcome, product: Timing | None) -> Record | None:
    """Milliseconds by phase; our fused encoder's time beyond the product counts as selection."""
    if outcome.phases is None:
        return None
    phases = {name: 1e3 * seconds for name, seconds in outcome.phases.items()}
    if (outcome.provider.module == "ours" or outcome.provider.accelerated) and product is not None:
        alone = min(product.median_ms, phases["product"])
        phases |= {"product": alone, "selection": phases["product"] - alone}
    return _rounded(phases)
