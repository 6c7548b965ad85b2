"""A few tokens on GPUs, emulated: bit for bit what a block of tokens gives, in two launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("triton", reason="the launches are those of the Triton kernels")

from encoding import DTYPES, scales
from test_screen import HARD

from sae_kernels import gpu
from sae_kernels.primitives.few_tokens import tile_of_few
from sae_kernels.primitives.select_threshold import triton as select_threshold
from sae_kernels.primitives.select_topk import reference, triton
from sae_kernels.primitives.select_topk_routed import reference as routed_reference
from sae_kernels.primitives.select_topk_routed import triton as routed
from sae_kernels.testing import Case, assert_bitwise, oracles

if TYPE_CHECKING:
    from collections.abc import Sequence

emulated_only = pytest.mark.skipif(
    gpu.interpreted(), reason="sums have no fixed order in the interpreter"
)
on_one_architecture = pytest.mark.parametrize("emulated_gpu", ["sm_80"], indirect=True)
BLOCK = 40  # more tokens than count as few


def assert_few_on_gpus_as_in_a_block(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
    counts: Sequence[int] = (1, 5, 16),
) -> None:
    """Selects by rank and by threshold for the first tokens alone, and for a block of them."""
    x = x.repeat(-(-BLOCK // x.shape[0]), 1)
    rank = (k, rank_scale, None, rank_scale is not None)  # by magnitude where there is a scale
    block = triton.run(x, W, b, *rank, screened=False)
    bounds = block[0][:, -1].nan_to_num(0).mean().expand(W.shape[0]).contiguous()
    above = select_threshold.run(x, W, b, bounds)
    for n in counts:
        assert tile_of_few(n, *W.T.shape, k) is not None
        few = triton.run(x[:n], W, b, *rank)
        for name, came, expected in zip(("values", "indices"), few, block, strict=True):
            assert_bitwise(f"{name} of {n} tokens", came, expected[:n])
        values, indices, offsets = select_threshold.run(x[:n], W, b, bounds)
        end = int(above[2][n])
        assert_bitwise(f"values above bounds of {n} tokens", values, above[0][:end])
        assert_bitwise(f"indices above bounds of {n} tokens", indices, above[1][:end])
        assert_bitwise(f"offsets of {n} tokens", offsets, above[2][: n + 1])


def test_which_calls_are_of_few_tokens() -> None:
    assert [tile_of_few(n, 768, 65536, 32) for n in (0, 1, 16, 17)] == [None, 64, 64, None]
    assert [tile_of_few(1, d_in, 65536) for d_in in (1, 2)] == [None, 64]
    # A block looks through 8192 entries: scores of the tiles that may win, and tiles.
    assert [tile_of_few(1, 768, 65536, k) for k in (128, 129)] == [64, None]
    assert [tile_of_few(1, 768, F, 64) for F in (1 << 19, (1 << 19) + 1, 1 << 20)] == [64, 128, 128]
    assert [tile_of_few(1, 768, F, k) for F, k in ((1 << 20, 65), ((1 << 20) + 1, 1))] == [
        None,
        None,
    ]
    # Their scores fill 32 MiB at most.
    assert [tile_of_few(n, 768, 1 << 20, 32) for n in (8, 9)] == [128, None]
    assert [tile_of_few(n, 768, (1 << 19) + 1, 32) for n in (15, 16)] == [128, None]


@pytest.mark.full
@emulated_only
@pytest.mark.usefixtures("emulated_gpu")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_the_bits_of_a_block(dtype: torch.dtype) -> None:
    x, W, b = Case("few", 16, 72, 1031, 13, dtype=dtype).inputs()
    assert_few_on_gpus_as_in_a_block(x, W, b, 13, counts=(1, 16))
    assert_few_on_gpus_as_in_a_block(x, W, None, 13, scales(1031), counts=(5,))


@pytest.mark.slow
@emulated_only
@pytest.mark.usefixtures("emulated_gpu")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs(kind: str, dtype: torch.dtype) -> None:
    x, W, b = Case("few", 9, 32, 5000, 3).inputs()
    assert b is not None
    x, W, b = HARD[kind](x, W, b)
    assert_few_on_gpus_as_in_a_block(x.to(dtype), W.to(dtype), b, 3, torch.rand(5000))
    assert_few_on_gpus_as_in_a_block(x.to(dtype), W.to(dtype), b, 3, counts=(2,))


# Fewer tiles than latents are kept, and more; a last tile of one or two latents.
@pytest.mark.full
@emulated_only
@pytest.mark.usefixtures("emulated_gpu")
@on_one_architecture
@pytest.mark.parametrize(("F", "k"), [(1, 1), (65, 65), (130, 128), (1025, 16)])
def test_ties_and_the_last_tile(F: int, k: int) -> None:
    # Integers are exact and many are equal: the latents are those of the reference.
    x, W, b = Case("ties", 3, 20, F, k, "ties").inputs()
    for scale in (None, scales(F)):
        few = triton.run(x, W, b, k, scale, None, scale is not None)
        wanted = reference.run(x, W, b, k, scale, None, scale is not None)
        assert_bitwise("values", few[0], wanted[0])
        assert_bitwise("indices", few[1], wanted[1])


@pytest.mark.slow
@emulated_only
@pytest.mark.usefixtures("emulated_gpu")
@on_one_architecture
@pytest.mark.parametrize(("F", "k"), [(1 << 19, 128), ((1 << 19) + 1, 64)])
def test_as_many_tiles_as_a_block_looks_through(F: int, k: int) -> None:
    x, W, b = Case("tiles", 2, 2, F, k, "integer", torch.bfloat16).inputs()
    few, wanted = (each.run(x, W, b, k, None) for each in (triton, reference))
    assert_bitwise("values", few[0], wanted[0])
    assert_bitwise("indices", few[1], wanted[1])


@pytest.mark.full
@emulated_only
@pytest.mark.usefixtures("emulated_gpu")
@pytest.mark.parametrize("n_experts", [4, 50])
def test_routed_tokens(n_experts: int) -> None:
    width, k = 90, 7
    x, W, b = Case("routed", 16, 24, width * n_experts, k, "integer", torch.bfloat16).inputs()
    for n in (1, 16):
        experts = torch.randint(n_experts, (n,), generator=torch.Generator().manual_seed(n))
        routes = oracles.routes(experts, n_experts)
        few, wanted = (each.run(x[:n], W, b, k, *routes) for each in (routed, routed_reference))
        assert_bitwise("values", few[0], wanted[0])
        assert_bitwise("indices", few[1], wanted[1])


@pytest.mark.full
@emulated_only
@pytest.mark.usefixtures("emulated_gpu")
@on_one_architecture
def test_routes_that_leave_tokens_out_reach_no_memory_of_others() -> None:
    x, W, b = Case("wrong", 4, 8, 2 * 80, 3).inputs()
    tokens, starts = torch.tensor([2, -1, 9, 4]), torch.tensor([0, 3, 7])
    few = routed.run(x, W, b, 3, tokens.int(), starts.int())
    wanted = routed_reference.run(x[2:3], W, b, 3, torch.tensor([0]), torch.tensor([0, 1, 1]))
    assert few[0].shape == (4, 3)  # of others than token 2 anything
    assert few[1][2].equal(wanted[1][0])
