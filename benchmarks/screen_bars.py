"""Times fp32 encoders with and without a screen, where it saves work and where it cannot.

``python -m benchmarks.screen_bars [--only encode hostile dense] [--out FILE]``. Every ratio is to
the same kernel without a screen, from one process with interleaved contestants.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.study import Records, Runs, bars, ratios
from sae_kernels.backends import cpu
from sae_kernels.backends.cpu import Screening
from sae_kernels.bench.cases import CPU_SMALL
from sae_kernels.bench.inputs import activations, threshold
from sae_kernels.primitives.select_threshold import cpu as select_threshold
from sae_kernels.primitives.select_topk import cpu as select_topk

if TYPE_CHECKING:
    from collections.abc import Callable

# At the edge of where scores are screened, and beyond it.
SHAPES = ((1024, 256, 8192, 32), (512, 768, 8192, 32))
HOSTILE: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "latents that grow": lambda x, W: (x, W * torch.linspace(1, 4, len(W))[:, None]),
    "latents that grow in turns": lambda x, W: (x, W * growing_in_turns(len(W))[:, None]),
    "equal latents": lambda x, W: (x, W[:1].expand_as(W).contiguous()),
    "heavy tails": lambda x, W: (x / torch.randn_like(x).abs().clamp(min=1e-3), W),
    "an outlier a token": lambda x, W: (x.scatter(1, somewhere(x), 60.0), W),
}


def growing_in_turns(n_latents: int) -> torch.Tensor:
    """Lengths of latents: 48 that are longer than all before, 48 of 1, and so on."""
    f = torch.arange(n_latents)
    return torch.where(f // 48 % 2 == 0, 1 + 2 * f / n_latents, 1.0)


def somewhere(x: torch.Tensor) -> torch.Tensor:
    """A column for each token."""
    return torch.randint(x.shape[1], (len(x), 1))


def screens(select: Callable[[Screening], object]) -> Runs:
    """A run without a screen, and one with each that this machine has in the variant in use."""
    ways = (Screening.NONE, *cpu.screenings(cpu.isa()))
    return {how.name.lower(): partial(select, how) for how in ways}


def topk(x: torch.Tensor, W: torch.Tensor, k: int, how: Screening) -> object:
    """The k best of every token."""
    return select_topk.run(x, W, None, k, None, screening=how)


def above(x: torch.Tensor, W: torch.Tensor, bounds: torch.Tensor, how: Screening) -> object:
    """The scores above their latents' bounds."""
    return select_threshold.run(x, W, None, bounds, screening=how)


def encode(kind: str, rounds: int) -> Records:
    """select_topk of cpu-small."""
    B, D, F, k = CPU_SMALL
    runs = screens(partial(topk, *activations(kind, B, D, F, k), k))
    yield from ratios(f"encode {kind} B={B} D={D} F={F} K={k}", runs, "none", rounds)


def hostile(_kind: str, rounds: int) -> Records:
    """select_topk of inputs that let many bounds pass."""
    torch.manual_seed(0)
    for B, D, F, k in SHAPES:
        for name, change in HOSTILE.items():
            runs = screens(partial(topk, *change(*activations("uniform", B, D, F, k)), k))
            yield from ratios(f"hostile B={B} D={D} F={F} K={k}: {name}", runs, "none", rounds)


def dense(_kind: str, rounds: int) -> Records:
    """select_threshold with thresholds that keep ever more entries."""
    for B, D, F, k in SHAPES:
        x, W = activations("uniform", B, D, F, k)
        for l0 in (50, 200, 400, 800, 4000):
            runs = screens(partial(above, x, W, torch.full((F,), threshold(x, W, l0))))
            yield from ratios(f"dense B={B} D={D} F={F}: L0 {l0}", runs, "none", rounds)


GROUPS = {"encode": encode, "hostile": hostile, "dense": dense}


if __name__ == "__main__":
    bars(GROUPS, __doc__, "screen_bars")
