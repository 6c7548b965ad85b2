"""A few tokens, whose encoder is cut by latents: bit for bit what a block of tokens gives.

With rows of W in 8 bits too, which rule out most latents before any score is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from encoding import DTYPES, cases, dtypes, scales
from test_screen import HARD, LARGE, lossy_rows, underrated

from sae_kernels.backends.cpu import FEW_TOKENS, Screening
from sae_kernels.primitives.narrow import narrowed
from sae_kernels.primitives.select_threshold import cpu as select_threshold
from sae_kernels.primitives.select_topk import cpu as select_topk
from sae_kernels.testing import Case, assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 40  # more tokens than count as few
threads_1_to_3 = pytest.mark.parametrize("threads", [1, 2, 3])


def assert_few_as_in_a_block(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
    counts: Sequence[int] = range(1, 21),
) -> None:
    """Selects for the first tokens alone, by narrow rows and without them, and for a block."""
    x = x.repeat(-(-BLOCK // x.shape[0]), 1)
    each = [(n, narrow) for n in counts for narrow in (None, narrowed(W))]
    for by_magnitude in (True, False):
        ranked_by = (rank_scale, None, by_magnitude)
        block = select_topk.run(x, W, b, k, *ranked_by, screening=Screening.NONE)
        for n, narrow in each:
            few = select_topk.run(x[:n], W, b, k, rank_scale, narrow, by_magnitude)
            for name, came, expected in zip(("values", "indices"), few, block, strict=True):
                assert_bitwise(f"{name} of {n} tokens", came, expected[:n])
    ranked = block[0][:, -1].nan_to_num(0)
    bounds = (ranked.mean() * torch.ones(W.shape[0], dtype=ranked.dtype)).contiguous()
    bounds[::5] -= 0.5
    values, indices, offsets = select_threshold.run(x, W, b, bounds, screening=Screening.NONE)
    for n, narrow in each:
        found = select_threshold.run(x[:n], W, b, bounds, narrow)
        end = int(offsets[n])
        for name, came, expected in zip(
            ("values", "indices", "offsets"),
            found,
            (values[:end], indices[:end], offsets[: n + 1]),
            strict=True,
        ):
            assert_bitwise(f"{name} above bounds of {n} tokens", came, expected)


@cases
@dtypes
def test_every_case(case: Case, dtype: torch.dtype, isa: str) -> None:
    x, W, b = case.cast(dtype).inputs()
    if x.shape[0] == 0:
        pytest.skip("no tokens")
    assert_few_as_in_a_block(x, W, b, case.K)
    assert_few_as_in_a_block(
        x, W, b, case.K, scales(case.F).to(torch.promote_types(dtype, torch.float32))
    )


@threads_1_to_3
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_on_threads(kind: str, dtype: torch.dtype, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    x, W, b = LARGE.inputs()
    assert b is not None
    x, W, b = HARD[kind](x, W, b)
    assert_few_as_in_a_block(x.to(dtype), W.to(dtype), b, LARGE.K, counts=(1, 2, 9, 16))


@threads_1_to_3
@pytest.mark.parametrize("k", [1, 32, 1000, 4999, 5000])
def test_threads_that_keep_more_than_they_come_by(k: int, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    x, W, b = LARGE.inputs()
    assert_few_as_in_a_block(x, W, b, k, torch.rand(LARGE.F), counts=(1, 3, 16))


@threads_1_to_3
@pytest.mark.parametrize("n_experts", [1, 4, 50])
def test_routed_tokens(n_experts: int, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    x, W, b = LARGE.inputs()
    for n in (1, 2, 7, 16):
        experts = torch.randint(n_experts, (n,), generator=torch.Generator().manual_seed(n))
        tokens = experts.argsort(stable=True).int()
        starts = torch.nn.functional.pad(experts.bincount(minlength=n_experts).cumsum(0), (1, 0))
        routes = select_topk.Routes(tokens, starts.int())
        few = select_topk.run(x[:n], W, b, 3, None, routes=routes)
        ruled_out = select_topk.run(x[:n], W, b, 3, None, narrowed(W), routes=routes)
        for name, came, expected in zip(("values", "indices"), ruled_out, few, strict=True):
            assert_bitwise(f"{name} by narrow rows", came, expected)
        width = LARGE.F // n_experts
        for t in range(n):
            part = slice(int(experts[t]) * width, (int(experts[t]) + 1) * width)
            block = x[t].expand(BLOCK, -1).contiguous()
            bias = None if b is None else b[part]
            values, indices = select_topk.run(
                block, W[part], bias, 3, None, screening=Screening.NONE
            )
            assert_bitwise("values", few[0][t], values[0])
            assert_bitwise("indices", few[1][t], indices[0] + part.start)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -30.0])
def test_rank_scales_that_bounds_cannot_follow(value: float, isa: str) -> None:
    x, W, b = LARGE.inputs()
    scale = torch.rand(LARGE.F)
    scale[[700, 3000, 4990]] = value
    assert_few_as_in_a_block(x, W, b, LARGE.K, scale, counts=(1, 5))


@lossy_rows
def test_winners_whose_narrow_scores_are_as_low_as_can_be(lossy: str, isa: str) -> None:
    x, W, winners = underrated(lossy)
    _, indices = select_topk.run(x[:3], W, None, 4, None, narrowed(W))
    assert indices.unique().tolist() == winners.tolist()
    assert_few_as_in_a_block(x, W, None, 4, counts=(3,))


@pytest.mark.parametrize("D", [1, 31, 4097, 1 << 15, (1 << 15) + 1])
def test_widths_at_which_tokens_have_fewer_steps(D: int, isa: str) -> None:
    x, W = torch.randn(2, D), torch.randn(70, D)
    W[:2] = x.sign() * 3  # the largest sums there can be
    x[1] = x[1].sign()
    assert_few_as_in_a_block(x, W, None, 3, counts=(2,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_narrow_rows_bound_what_rounding_lost(dtype: torch.dtype) -> None:
    W = torch.randn(50, 37).to(dtype)
    W[3], W[4, 2], W[5], W[6, 0] = 0, torch.inf, 1e-12, torch.nan
    rows = narrowed(W)
    scale, length, error, _ = rows[:, -16:].contiguous().view(torch.float32).double().T
    kept = rows[:, :37].double() * scale[:, None]
    assert not rows[:, 37:-16].any()
    assert bool((length >= kept.norm(dim=1)).all())
    assert error.isnan().nonzero().flatten().tolist() == [4, 5, 6]
    bounded = ~error.isnan()
    lost = (W.double() - kept).norm(dim=1)[bounded]
    assert bool(((lost <= error[bounded]) & (error[bounded] <= lost * 1.00001)).all())


def test_narrow_rows_are_what_is_read() -> None:
    # Rows that bound a score falsely, as zero, hide the latent that would win.
    x, W, _ = LARGE.inputs()
    best = int(select_topk.run(x[:1], W, None, 1, None)[1])
    rows = narrowed(W)
    rows[best] = 0
    few = (
        select_topk.run(x[:n], W, None, 1, None, rows)[1][0]
        for n in (1, FEW_TOKENS, FEW_TOKENS + 1)
    )
    assert [int(indices) == best for indices in few] == [False, False, True]
