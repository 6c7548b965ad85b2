"""row_grad and row_sqnorm on every backend against dense gradients in fp64."""

from __future__ import annotations

import pytest
import torch
from refusals import needs

from sae_kernels import gpu
from sae_kernels.codes import LatentOrder
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.row_sqnorm import row_sqnorm
from sae_kernels.primitives.row_update import halves
from sae_kernels.primitives.terms import Gradient, Term
from sae_kernels.primitives.transpose_codes import transpose_codes
from sae_kernels.testing import assert_bitwise, assert_within, gamma, oracles, rounding

PRIMITIVES = ("row_grad", "row_sqnorm")

SOURCES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, None)
sources = pytest.mark.parametrize("source", SOURCES, ids=lambda d: str(d).removeprefix("torch."))
highs = pytest.mark.parametrize("high", [torch.float32, torch.float64], ids=["fp32", "fp64"])
# B, K, F, width: odd widths, more entries per latent than one batch of rows, a vector (width 1).
SHAPES = (
    (6, 3, 5, 37),
    (1, 1, 1, 1),
    (0, 2, 4, 8),
    (200, 4, 9, 20),
    (30, 8, 50, 1),
    (9, 4, 70, 129),
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def make_term(
    shape: tuple[int, int, int, int], high: torch.dtype, source_dtype: torch.dtype | None
) -> tuple[Term, torch.Tensor, torch.Tensor]:
    """A term whose latent 0 is hot, its dense gradient in fp64 and the absolute terms of it."""
    B, K, F, width = shape
    indices = torch.rand(B, F).argsort(dim=1)[:, :K].to(torch.int32)
    indices[:, 0] = 0
    coef = torch.randn(B, K, dtype=high)
    source = torch.randn(B, width).to(source_dtype) if source_dtype else None
    order = LatentOrder(*transpose_codes(indices, None, None, F, backend="reference"))
    rows = torch.ones(B, width) if source is None else source
    # Added up entry by entry, for a latent may come twice in a token here.
    dense, magnitude = torch.zeros(2, F, width, dtype=torch.float64)
    for token in range(B):
        for entry in range(K):
            add = coef[token, entry].double() * rows[token].double()
            dense[indices[token, entry]] += add
            magnitude[indices[token, entry]] += add.abs()
    return order.term(coef, source), dense, magnitude


@shapes
@sources
@highs
def test_row_grad(
    shape: tuple[int, int, int, int],
    source: torch.dtype | None,
    high: torch.dtype,
    backend: str,
) -> None:
    needs("row_grad", high, backend)
    term, dense, magnitude = make_term(shape, high, source)
    out = row_grad([term], shape[2], shape[3], backend=backend)[0]
    assert out.dtype == high
    n = shape[0] * shape[1] + 1  # and one for rounding the source, if it is wider
    assert_within("gradient", out, dense, rounding(n, magnitude, high))


@shapes
def test_some_latents_are_rows_of_all(shape: tuple[int, int, int, int], backend: str) -> None:
    """A slice of the offsets is the same term for some latents: micro-batches add up by such."""
    term, _, _ = make_term(shape, torch.float32, torch.float32)
    _, _, F, width = shape
    whole = row_grad([term], F, width, backend=backend)[0]
    for first in range(0, F, 4):
        last = min(first + 4, F)
        some = term._replace(offsets=term.offsets[first : last + 1])
        out = row_grad([some], last - first, width, backend=backend)[0]
        assert_bitwise("rows", out, whole[first:last])


def test_terms_of_several_sources_add_up(backend: str) -> None:
    shape = (15, 4, 11, 33)
    made = [make_term(shape, torch.float32, source) for source in SOURCES]
    out = row_grad([term for term, _, _ in made], 11, 33, backend=backend)[0]
    magnitude = torch.stack([m for _, _, m in made]).sum(0)
    expected = torch.stack([dense for _, dense, _ in made]).sum(0)
    assert_within("gradient", out, expected, rounding(15 * 4 * 5 + 1, magnitude, torch.float32))


def test_integer_terms_add_up_exactly(backend: str) -> None:
    term, _, _ = make_term((300, 3, 7, 19), torch.float32, torch.float32)
    assert term.source is not None
    term = term._replace(coef=(term.coef * 3).round(), source=(term.source * 3).round())
    expected = row_grad([term._replace(coef=term.coef.double())], 7, 19, backend="reference")[0]
    assert_within("gradient", row_grad([term], 7, 19, backend=backend)[0], expected, 0.0)


def test_strided_coefficients_and_sources(backend: str) -> None:
    term, dense, magnitude = make_term((20, 4, 6, 30), torch.float32, torch.float32)
    assert term.source is not None
    strided = term._replace(
        coef=torch.stack([term.coef, torch.full_like(term.coef, torch.nan)], 1)[:, 0],
        source=term.source.T.contiguous().T,
    )
    out = row_grad([strided], 6, 30, backend=backend)[0]
    assert_within("gradient", out, dense, rounding(81, magnitude, torch.float32))


def test_a_hot_latent_with_a_segment_of_70000_entries(backend: str) -> None:
    if gpu.interpreted():
        pytest.skip("too long for Triton's interpreter; the next test has latents of 1100 entries")
    n = 70_000
    indices = torch.ones(n, 1, dtype=torch.int32)
    coef, source = torch.randint(-2, 3, (n,)).float(), torch.randint(-2, 3, (n, 3)).float()
    order = LatentOrder(*transpose_codes(indices, None, None, 3, backend="reference"))
    out = row_grad([order.term(coef, source)], 3, 3, backend=backend)[0]
    expected = torch.zeros(3, 3)
    expected[1] = coef @ source  # integers below 2^24: exact in any order
    assert torch.equal(out, expected)


# Latents of no, one, nearly a chunk's (256), exactly a chunk's and many chunks' entries, on and off
# a chunk's edges, and 100 entries that were dropped.
COUNTS = (0, 256, 0, 255, 1, 0, 700, 56, 1, 510, 2, 0, 1100, 0, 0, 40, 512)


def uneven_term(width: int, source: bool = True) -> tuple[Term, torch.Tensor]:
    """Small integers, and the gradient, which is exact in any order of summation."""
    counts = torch.tensor(COUNTS)
    n = int(counts.sum()) + 100
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    entries, rows = torch.randperm(n).to(torch.int32), torch.randint(50, (n,)).to(torch.int32)
    coef, x = torch.randint(-2, 3, (n,)).float(), torch.randint(-2, 3, (50, width)).float()
    weighted = coef[entries.long()][:, None] * (x[rows.long()] if source else 1.0)
    latents = torch.arange(len(COUNTS)).repeat_interleave(counts)
    grad = torch.zeros(len(COUNTS), width).index_add_(0, latents, weighted[:-100].expand(-1, width))
    return Term(offsets, entries, rows, coef, x if source else None), grad


@pytest.mark.parametrize("width", [1, 5, 300], ids=lambda width: f"width-{width}")
def test_latents_of_very_different_popularity(width: int, backend: str) -> None:
    made = [uneven_term(width), uneven_term(width, source=False)]
    out = row_grad([term for term, _ in made], len(COUNTS), width, backend=backend)[0]
    assert torch.equal(out, made[0][1] + made[1][1])


def test_a_long_list_has_longer_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "triton":
        pytest.skip(f"{backend} does not cut the list of entries into chunks")
    from sae_kernels.primitives.row_grad import triton

    monkeypatch.setattr(triton, "_MOST_CHUNKS", 7)
    term, grad = uneven_term(5)
    assert triton.packed_terms([term], 5)[1]["CHUNK"] == 512
    assert torch.equal(row_grad([term], len(COUNTS), 5, backend=backend)[0], grad)


@shapes
@pytest.mark.parametrize("source", SOURCES[:3], ids=str)
@pytest.mark.parametrize("dtype", SOURCES[:3], ids=str)
def test_products_with_a_matrix(
    shape: tuple[int, int, int, int], source: torch.dtype, dtype: torch.dtype, backend: str
) -> None:
    term, dense, magnitude = make_term(shape, torch.float32, source)
    assert term.source is not None
    (B, K, F, width), W = shape, torch.randn(shape[2], shape[3]).to(dtype)
    out, dots = row_grad([term], F, width, W=W, backend=backend)
    assert_within("gradient", out, dense, rounding(B * K, magnitude, torch.float32))
    latents = torch.arange(F).repeat_interleave(term.offsets.diff().long())
    products = W[latents].double() * term.source[term.rows.long()].double()
    exact, terms = torch.zeros(2, B * K, dtype=torch.float64)
    exact[term.entries.long()], terms[term.entries.long()] = products.sum(1), products.abs().sum(1)
    assert_within("dots", dots, exact, rounding(width, terms, torch.float32))


@pytest.mark.parametrize("width", [5, 300], ids=lambda width: f"width-{width}")
def test_products_of_popular_latents(width: int, backend: str) -> None:
    """Each entry's product is written once, whether a chunk, a row or nobody has it."""
    term, grad = uneven_term(width)
    assert term.source is not None
    W, expected = torch.randint(-2, 3, grad.shape).bfloat16(), torch.zeros(term.coef.shape)
    latents = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    listed, rows = (t[:-100].long() for t in (term.entries, term.rows))
    expected[listed] = (W.float()[latents] * term.source[rows]).sum(1)
    out, dots = row_grad([term], *grad.shape, W=W, backend=backend)
    assert torch.equal(out, grad)
    assert torch.equal(dots, expected)


def test_an_entry_of_coefficient_zero_adds_nothing_and_has_its_product(backend: str) -> None:
    indices = torch.tensor([[0], [0], [1]], dtype=torch.int32)
    order = LatentOrder(*transpose_codes(indices, None, None, 2, backend="reference"))
    source = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.inf, 3.0]])
    term = order.term(torch.tensor([2.0, 0.0, 0.0]), source)
    out, dots = row_grad([term], 2, 2, W=torch.ones(2, 2), backend=backend)
    assert out.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert dots.isnan().tolist() == [False, True, False]
    assert dots[[0, 2]].tolist() == [3.0, torch.inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    term, _, _ = make_term((200, 4, 9, 20), torch.float32, torch.bfloat16)
    whole = row_grad([term], 9, 20, backend=backend)[0]
    out = row_grad([term], 9, 20, dtype=dtype, backend=backend)[0]
    assert_bitwise("gradient", out, whole.to(dtype))


def test_repeats_are_bitwise_equal(backend: str) -> None:
    if gpu.interpreted():
        pytest.skip("Triton's interpreter runs programs one after the other")
    term, _ = uneven_term(40)
    term = term._replace(coef=torch.randn_like(term.coef))
    first, again = (row_grad([term], len(COUNTS), 40, backend=backend)[0] for _ in range(2))
    assert_bitwise("gradient", again, first)


def test_a_latent_without_entries_has_a_zero_gradient(backend: str) -> None:
    indices = torch.tensor([[2]], dtype=torch.int32)
    order = LatentOrder(*transpose_codes(indices, None, None, 4, backend="reference"))
    out = row_grad([order.term(torch.ones(1), torch.ones(1, 3))], 4, 3, backend=backend)[0]
    assert out.tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("source", SOURCES[:3], ids=str)
def test_repeats_and_thread_counts_are_bitwise_equal(source: torch.dtype, isa: str) -> None:
    term, _, _ = make_term((150, 5, 300, 41), torch.float32, source)
    first = row_grad([term], 300, 41, backend="cpu")[0]
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        assert_bitwise(f"repeat {repeat}", row_grad([term], 300, 41, backend="cpu")[0], first)


@highs
@pytest.mark.parametrize("norm", ["none", "unit", "at_most_one"])
@pytest.mark.parametrize("slices", [1, 3], ids=["whole", "slices"])
@pytest.mark.parametrize("parts", [[], [1], [4]], ids=["one-norm", "one-part", "norms"])
@pytest.mark.parametrize("width", [36, 3 * 600], ids=lambda width: f"width-{width}")
def test_row_sqnorm(
    width: int, parts: list[int], norm: str, slices: int, high: torch.dtype, backend: str
) -> None:
    shape = (14, 4, 21, width)
    term, grad, magnitude = make_term(shape, high, torch.float32)
    param = torch.randn(21, width, dtype=high)
    param = (
        param.unflatten(1, (slices, -1))
        / param.unflatten(1, (slices, -1)).norm(dim=-1, keepdim=True)
    ).flatten(1)
    dense = torch.randn(3, width, dtype=high)
    latents = torch.tensor([20, -1, 4], dtype=torch.int32)
    row_coef = torch.randn(21, *parts, dtype=high)
    row_coef[3] = 0
    gradient = Gradient([term], row_coef, dense, latents)
    needs("row_sqnorm", high, backend, (param, gradient, None, norm, slices))
    penalty = oracles.row_penalty(param, row_coef)
    grad = grad + penalty
    grad[[20, 4]] += dense[[0, 2]].double()
    magnitude = magnitude + penalty.abs()
    magnitude[[20, 4]] += dense[[0, 2]].abs().double()
    out = row_sqnorm(param, gradient, norm=norm, slices=slices, backend=backend)
    # The penalty's coefficient goes through a norm (width + 3 roundings) before it is added.
    dg = rounding(14 * 4 + 2, magnitude, high) + gamma(width + 3, high) * penalty.abs()
    if norm == "unit":
        part = [t.unflatten(1, (slices, -1)) for t in (dg, grad.abs(), param.double().abs())]
        along = ((part[0] + gamma(width // slices + 2, high) * part[1]) * part[2]).sum(
            -1, keepdim=True
        )
        dg = dg + (along * part[2]).flatten(1) + gamma(2, high) * grad.abs()
        grad = oracles.projected(param.double(), grad, slices)
    exact = grad.square().sum(1)
    budget = ((2 * grad.abs() + dg) * dg).sum(1) + rounding(width + 1, exact, high)
    assert_within("sqnorm", out, exact, budget)


@pytest.mark.parametrize("norm", ["none", "unit"])
def test_the_sqnorm_of_a_split_master_is_that_of_the_whole(norm: str, backend: str) -> None:
    needs("row_grad", torch.int16, backend)
    term, _, _ = make_term((14, 4, 21, 36), torch.float32, torch.float32)
    gradient = Gradient([term], row_coef=torch.randn(21))
    param = torch.randn(21, 36)
    high, low = halves.split(param)
    whole = row_sqnorm(param, gradient, norm=norm, backend=backend)
    assert_bitwise(
        "sqnorm", row_sqnorm(low, gradient, high=high, norm=norm, backend=backend), whole
    )
    assert bool((whole > 0).all())
