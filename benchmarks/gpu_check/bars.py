"""How good the kernels should be on one H200, and where a run says how good they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from benchmarks.gpu_check.kernels import DECODE_SHAPES, PEER
from benchmarks.gpu_check.steps import LAYOUTS
from sae_kernels.bench.cases import GPU_YARDSTICKS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.gpu_check.bench import Record


class Bar(NamedTuple):
    """A promise about one figure of one record.

    Attributes:
        case, provider: of the record; a provider's version is left out.
        field: the figure.
        limit: what it is held to.
        at_most: whether the limit is the largest that is good enough, or the least.
        text: the promise in words.
    """

    case: str
    provider: str
    field: str
    limit: float
    text: str
    at_most: bool = True

    def value(self, records: Iterable[Record]) -> float | None:
        """The figure of a run; None if the run does not say."""
        for record in records:
            name = str(record.get("provider", record.get("kernel", "")))
            case = record.get("case", record.get("what"))
            same = name == self.provider or name.startswith(f"{self.provider} ")
            if case == self.case and same and record.get(self.field) is not None:
                return float(record[self.field])
        return None

    def met(self, value: float) -> bool:
        """Whether a figure is good enough."""
        return value <= self.limit if self.at_most else value >= self.limit


def _select(backend: str, name: str, limit: float) -> Iterable[Bar]:
    case, of = f"select_topk {name}", f"select_topk on {backend} at {name}"
    yield Bar(case, backend, "ratio", limit, f"{of}: time over that of the product alone")
    # No [B, F] in any dtype or part: results, lists and scratch are a small share of it.
    B, _, F, _ = GPU_YARDSTICKS[name]
    share = 2 * B * F / 16 / 2**20
    yield Bar(case, backend, "extra_mib", share, f"{of}: MiB allocated, a 16th of bf16 scores")


def _few_tokens() -> Iterable[Bar]:
    for n in (1, 4, 16):
        text = f"select_topk on triton of {n} tokens at gpu-small: time over reading W once"
        yield Bar(f"select_topk gpu-small B={n}", "triton", "of_floor", 1.6, text)


def _routed() -> Iterable[Bar]:
    for experts, limit in ((8, 0.32), (32, 0.16)):
        case, of = f"select_topk_routed gpu-small E={experts}", f"{experts} experts at gpu-small"
        text = f"select_topk_routed on triton, {of}: time over that of the dense product"
        yield Bar(case, "triton", "ratio", limit, text)


def _decode() -> Iterable[Bar]:
    for K in DECODE_SHAPES:
        case, of = f"decode F=65536 D=2304 K={K}", f"decode and backward, F=65536 D=2304 K={K}"
        yield Bar(case, "sae_kernels", "of_floor", 1.6, f"{of}: time over its floor")
        yield Bar(case, PEER, "ratio", 2, f"{of}: {PEER}'s time over ours", at_most=False)
        yield Bar(case, PEER, "memory_ratio", 2, f"{of}: {PEER}'s memory over ours", at_most=False)


def _steps() -> Iterable[Bar]:
    dense = "dense, bf16 autocast, torch.compile"
    for name in ("gpu-small", "gpu-mid"):
        text = f"FusedStep at {name}, as a CUDA graph: time over its floor"
        yield Bar(f"step {name}", "FusedStep", "of_floor", 1.5, text)
        text = f"FusedStep at {name}: the compiled dense step's time over ours"
        yield Bar(f"dense {name}", dense, "ratio", 4, text, at_most=False)
    for layout in LAYOUTS:
        text = f"FusedStep at gpu-wide ({layout}), from nothing to a whole step: GB allocated"
        yield Bar(f"step gpu-wide, {layout}", "FusedStep", "peak_gb", 80, text)
    for kind in ("one latent in every token", "Zipf"):
        text = f"FusedStep with hot latents ({kind}): time over uniform ones"
        yield Bar("hot latents", kind, "ratio", 1.3, text)
    text = "FusedStep: of 20 repeats, those with other bits"
    yield Bar("repeats", "FusedStep", "different", 0, text)


BARS: tuple[Bar, ...] = (
    *_select("cuda", "gpu-small", 1.6),
    *_select("cuda", "gpu-mid", 1.3),
    *_select("triton", "gpu-small", 1.45),
    *_select("triton", "gpu-mid", 1.25),
    *_select("gluon", "gpu-mid", 1.15),
    *_few_tokens(),
    *_routed(),
    *_decode(),
    *_steps(),
)
