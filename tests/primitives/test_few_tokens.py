"""A few tokens, whose encoder is cut by latents: bit for bit what a block of tokens gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from encoding import DTYPES, cases, dtypes, scales
from test_screen import HARD, LARGE

from sae_kernels.primitives.select_threshold import cpu as select_threshold
from sae_kernels.primitives.select_topk import cpu as select_topk
from sae_kernels.testing import Case, assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 40  # more tokens than count as few
threads_1_to_3 = pytest.mark.parametrize("threads", [1, 2, 3])


def assert_same(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
    counts: Sequence[int] = range(1, 21),
) -> None:
    """Selects for the first tokens alone and for those in a block."""
    x = x.repeat(-(-BLOCK // x.shape[0]), 1)
    block = select_topk.run(x, W, b, k, rank_scale, screened=False)
    for n in counts:
        few = select_topk.run(x[:n], W, b, k, rank_scale)
        for name, came, expected in zip(("values", "indices"), few, block, strict=True):
            assert_bitwise(f"{name} of {n} tokens", came, expected[:n])
    ranked = block[0][:, -1].nan_to_num(0)
    bounds = (ranked.mean() * torch.ones(W.shape[0], dtype=ranked.dtype)).contiguous()
    bounds[::5] -= 0.5
    values, indices, offsets = select_threshold.run(x, W, b, bounds, screened=False)
    for n in counts:
        found = select_threshold.run(x[:n], W, b, bounds)
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
    assert_same(x, W, b, case.K)
    assert_same(x, W, b, case.K, scales(case.F).to(torch.promote_types(dtype, torch.float32)))


@threads_1_to_3
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_on_threads(kind: str, dtype: torch.dtype, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    x, W, b = LARGE.inputs()
    assert b is not None
    x, W, b = HARD[kind](x, W, b)
    assert_same(x.to(dtype), W.to(dtype), b, LARGE.K, counts=(1, 2, 9, 16))


@threads_1_to_3
@pytest.mark.parametrize("k", [1, 32, 1000, 4999, 5000])
def test_threads_that_keep_more_than_they_come_by(k: int, threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    x, W, b = LARGE.inputs()
    assert_same(x, W, b, k, torch.rand(LARGE.F), counts=(1, 3, 16))


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
        few = select_topk.run(x[:n], W, b, 3, None, routes)
        width = LARGE.F // n_experts
        for t in range(n):
            part = slice(int(experts[t]) * width, (int(experts[t]) + 1) * width)
            block = x[t].expand(BLOCK, -1).contiguous()
            bias = None if b is None else b[part]
            values, indices = select_topk.run(block, W[part], bias, 3, None, screened=False)
            assert_bitwise("values", few[0][t], values[0])
            assert_bitwise("indices", few[1][t], indices[0] + part.start)
