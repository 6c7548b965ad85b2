"""Problems that hypothesis draws: shapes, dtypes, strides, ISA variants and thread counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from encoding import DTYPES
from hypothesis import strategies as st

from sae_kernels.backends import cpu
from sae_kernels.primitives.checks import accumulator

if TYPE_CHECKING:
    from collections.abc import Callable


def offset(t: torch.Tensor) -> torch.Tensor:
    """Starts one element into its storage: aligned to the element only."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype)
    view = storage[1:].view(t.shape)
    return view.copy_(t)


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The middle of something larger, surrounded by what must not be read."""
    shape = tuple(s + 2 for s in t.shape)
    filler = torch.nan if t.is_floating_point() else 2**30
    large = torch.full(shape, filler, dtype=t.dtype)
    view = large[tuple(slice(1, -1) for _ in shape)]
    return view.copy_(t)


# Views with the same elements as their argument and other strides.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "packed": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "sliced": sliced,
    "step-2": lambda t: torch.stack([t, torch.zeros_like(t)], -1)[..., 0],
    "offset": offset,
}


class Drawn(NamedTuple):
    """A problem and how its tensors lie."""

    B: int
    D: int
    F: int
    k: int
    dtype: torch.dtype
    isa: str
    threads: int
    seed: int
    layout: dict[str, str]
    expanded: bool

    def place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in its drawn layout."""
        return LAYOUTS[self.layout[name]](tensor)

    def integers(self, *shape: int) -> torch.Tensor:
        """Small integers in the accumulator dtype."""
        return torch.randint(-3, 4, shape).to(accumulator(self.dtype))


@st.composite
def problems(draw: st.DrawFn) -> Drawn:
    """Sizes around vector lengths and tiles; any k up to F."""
    near = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 97, 127, 129])
    F = draw(near | st.integers(1, 400))
    return Drawn(
        B=draw(st.integers(0, 5) | near),
        D=draw(near | st.integers(1, 80)),
        F=F,
        k=draw(st.sampled_from([1, F]) | st.integers(1, F)),
        dtype=draw(st.sampled_from(DTYPES)),
        isa=draw(st.sampled_from(cpu.supported_isas())),
        threads=draw(st.sampled_from([1, 2, 4])),
        seed=draw(st.integers(0, 2**20)),
        layout={
            name: draw(st.sampled_from(sorted(LAYOUTS)))
            for name in ("x", "W", "values", "indices", "grad")
        },
        expanded=draw(st.booleans()),
    )
