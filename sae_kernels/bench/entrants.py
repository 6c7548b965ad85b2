"""A provider in a case, and the record of what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sae_kernels.bench.contestants.rates import COPIED_BYTES
from sae_kernels.bench.needs import needs
from sae_kernels.bench.timing import Timing, summary

if TYPE_CHECKING:
    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.gate import Error
    from sae_kernels.bench.providers import Provider
    from sae_kernels.bench.results import Record


@dataclass
class Entrant:
    """A provider in a case: what is known of it so far."""

    provider: Provider
    status: str = "measured"
    reason: str | None = None
    error: Error | None = None
    about: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    last: float = 0.0
    peak_bytes: int | None = None
    phases: dict[str, float] | None = None

    def out(self, status: str, reason: str) -> None:
        """Takes no further part."""
        self.status, self.reason = status, reason

    @property
    def timing(self) -> Timing | None:
        """Of its turns, if it is still in and had any."""
        return summary(self.seconds) if self.status == "measured" and self.seconds else None


def records(case: Case, entrants: list[Entrant]) -> list[Record]:
    """What is reported of a case."""
    times = {e.provider.key: e.timing for e in entrants}
    shipped = next(
        (e.timing for e in entrants if e.provider.name == "ours" and e.provider.as_shipped), None
    )
    copy = times.get("copy int8")
    found = []
    for entrant in entrants:
        provider, timing = entrant.provider, entrant.timing
        record: Record = {
            **case.facts(),
            "provider": provider.name,
            "dtype": provider.dtype,
            "as_shipped": provider.as_shipped,
            "status": entrant.status,
            "reason": entrant.reason,
            "rounds": len(entrant.seconds),
            "peak_bytes": entrant.peak_bytes,
            "max_error": entrant.error.error if entrant.error else None,
            "error_budget": entrant.error.budget if entrant.error else None,
        }
        if timing is not None:
            record |= {name: round(value, 4) for name, value in timing._asdict().items()}
        if timing is not None and provider.operation is None:
            ours = times.get(f"ours {provider.dtype}")
            record["speedup_of_ours"] = _ratio(timing, ours)
            record["speedup_of_ours_default"] = _ratio(timing, shipped)
            product = times.get(f"product {provider.dtype}")
            record |= _rates(case, provider.dtype, timing, product, copy)
            record["phases_ms"] = _phases(entrant, product)
        found.append(record)
    return found


def _ratio(timing: Timing, base: Timing | None) -> float | None:
    return None if base is None else round(timing.median_ms / base.median_ms, 4)


def _rates(
    case: Case, dtype: str, timing: Timing, product: Timing | None, copy: Timing | None
) -> Record:
    work, seconds = needs(case, dtype), timing.median_ms / 1e3
    rates: Record = {"gflops": work.flops / seconds / 1e9, "gbps": work.moved_bytes / seconds / 1e9}
    if product is not None and copy is not None:
        floor = work.floor_ms(product.median_ms, 2e3 * COPIED_BYTES / copy.median_ms)
        rates |= {"floor_ms": floor, "of_roofline": floor / timing.median_ms}
    return {name: round(value, 4) for name, value in rates.items()}


def _phases(entrant: Entrant, product: Timing | None) -> Record | None:
    """In ms; of our fused encoder what is over the product alone is the selection."""
    if entrant.phases is None:
        return None
    phases = {name: 1e3 * seconds for name, seconds in entrant.phases.items()}
    if entrant.provider.module == "ours" and product is not None:
        alone = min(product.median_ms, phases["product"])
        phases |= {"product": alone, "selection": phases["product"] - alone}
    return {name: round(ms, 4) for name, ms in phases.items()}
