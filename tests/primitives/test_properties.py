"""Properties over drawn shapes, strides, k, dtypes, ISA variants and thread counts.

Inputs are small integers, so that every sum is exact and results must be equal, not close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from sae_kernels.backends import cpu
from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.terms import Term
from sae_kernels.primitives.transpose_codes import transpose_codes
from sae_kernels.testing import assert_bitwise, assert_within, oracles

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch, restore_threads: None) -> Callable[[Drawn], None]:
    """Puts a drawn problem's variant, threads and seed into force."""

    def do(drawn: Drawn) -> None:
        monkeypatch.setenv(cpu.ISA_VARIABLE, drawn.isa)
        torch.set_num_threads(drawn.threads)
        torch.manual_seed(drawn.seed)

    return do


@hypothesis.given(drawn=problems())
def test_select_topk(drawn: Drawn, enter: Any) -> None:
    enter(drawn)
    x = drawn.integers(drawn.B, drawn.D).to(drawn.dtype)
    x = x[:1].expand(drawn.B, -1) if drawn.expanded and drawn.B else drawn.place("x", x)
    W, b = drawn.integers(drawn.F, drawn.D), drawn.integers(drawn.F)
    W = drawn.place("W", W.to(drawn.dtype))
    values, indices = select_topk(x, W, b, drawn.k, None, backend="cpu")
    exact = oracles.scores(x, W, b)
    assert_bitwise("indices", indices.long(), oracles.selection(exact.key, drawn.k))
    assert_within("values", values, exact.h.gather(1, indices.long()), 0.0)


@hypothesis.given(drawn=problems())
def test_decode_and_its_gradients(drawn: Drawn, enter: Any) -> None:
    enter(drawn)
    indices = torch.rand(drawn.B, drawn.F).argsort(1)[:, : drawn.k].to(torch.int32)
    values, grad = drawn.integers(drawn.B, drawn.k), drawn.integers(drawn.B, drawn.D)
    W = drawn.integers(drawn.F, drawn.D)
    ends = torch.tensor([drawn.F // 3, drawn.F], dtype=torch.int32) if drawn.seed % 2 else None
    args = (drawn.place("indices", indices), drawn.place("W", W.to(drawn.dtype)))
    out = decode(drawn.place("values", values), *args, None, ends, backend="cpu")
    assert_within("x_hat", out, oracles.decode(values, indices, W, None, ends)[0], 0.0)
    dvalues = code_grad(drawn.place("grad", grad), *args, None, backend="cpu")
    assert_within("dvalues", dvalues, oracles.code_grad(grad, indices, W)[0], 0.0)


@hypothesis.given(drawn=problems())
def test_latent_order_and_weight_gradient(drawn: Drawn, enter: Any) -> None:
    enter(drawn)
    indices = torch.rand(drawn.B, drawn.F).argsort(1)[:, : drawn.k].to(torch.int32)
    values = drawn.integers(drawn.B, drawn.k)
    source = drawn.integers(drawn.B, drawn.D).to(drawn.dtype)
    ours, reference = (
        transpose_codes(
            drawn.place("indices", indices),
            drawn.place("values", values),
            None,
            drawn.F,
            backend=backend,
        )
        for backend in ("cpu", "reference")
    )
    for name, a, e in zip(("offsets", "entries", "rows"), ours, reference, strict=True):
        assert_bitwise(name, a, e)
    term = Term(*ours, values.flatten(), drawn.place("grad", source))
    dW = row_grad([term], drawn.F, drawn.D, backend="cpu")
    dense = oracles.dense_codes(values, indices, drawn.F)
    assert_within("dW", dW, dense.T @ source.double(), 0.0)


@pytest.mark.slow
@hypothesis.settings(max_examples=1500)
@hypothesis.given(drawn=problems())
def test_select_topk_at_length(drawn: Drawn, enter: Any) -> None:
    test_select_topk.hypothesis.inner_test(drawn, enter)
