"""The kernel of the tile-streamed selection, run on the host, against the oracle and the reference.

The products are torch's here and cuBLAS's on a GPU; all that comes after them is what runs there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.errors import BackendUnavailableError
from sae_kernels.primitives.select_topk import cuda as tiles
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.testing import CASES, Case, assert_bitwise, assert_selects

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cuda.conftest import OnHost

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of rows and tiles of latents, the last of each smaller than the others."""
    monkeypatch.setattr(tiles, "tile_shape", lambda B, F: (min(16, max(1, B)), 60))


def select(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is tested."""
    values, indices = select_topk(x, W, b, k, rank_scale, backend="cuda")
    return values, indices


def check(case: Case, rank_scale: torch.Tensor | None = None) -> None:
    """Selects and compares with the oracle."""
    assert_selects(case, *select(*case.inputs(), case.K, rank_scale), rank_scale)


@cases
@dtypes
def test_against_the_oracle(case: Case, dtype: torch.dtype, on_host: OnHost) -> None:
    check(case.cast(dtype))
    assert set(on_host.launches) == ({"select_tile"} if case.B else set())


@cases
def test_tile_after_tile(case: Case, on_host: OnHost, small_tiles: None) -> None:
    check(case)
    assert len(on_host.launches) == -(-case.B // 16) * -(-case.F // 60)


@cases
def test_rank_scale_changes_the_order_and_not_the_values(
    case: Case, on_host: OnHost, small_tiles: None
) -> None:
    # Powers of two (and in between 0 and a negative one) keep the exact kinds exact.
    scale = torch.tensor([1.0, 2.0, 0.5, 4.0, 0.0, -1.0, 1.0]).repeat(case.F // 7 + 1)[: case.F]
    check(case, scale)
    assert set(on_host.launches) == ({"select_tile_scaled"} if case.B else set())


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_selections_nest_in_k(scaled: bool, on_host: OnHost, small_tiles: None) -> None:
    x, W, b = Case("nested", 3, 24, 301, 1).inputs()
    scale = torch.rand(301) + 0.5 if scaled else None
    values, indices = select(x, W, b, 301, scale)
    assert sorted(indices[0].tolist()) == list(range(301))
    for k in (*range(1, 70), *range(70, 301, 7), 300):
        fewer = select(x, W, b, k, scale)
        assert_bitwise(f"values for k={k}", fewer[0], values[:, :k])
        assert_bitwise(f"indices for k={k}", fewer[1], indices[:, :k])


@pytest.mark.parametrize("k", [511, 512, 513, 2048, 4095, 4096])
def test_many_kept(k: int, on_host: OnHost) -> None:
    scores = torch.randn(2, 4300)
    values, indices = select(torch.eye(2), scores.T, None, k)
    best = scores.sort(dim=1, descending=True, stable=True)
    assert_bitwise("values", values, best.values[:, :k])
    assert_bitwise("indices", indices, best.indices[:, :k].int())


@pytest.mark.parametrize("rows", [2, 40], ids=["wide-blocks", "narrow-blocks"])
def test_ascending_scores_overflow_every_list(rows: int, on_host: OnHost) -> None:
    # Every entry beats all before it: each list fills up again and again.
    W = torch.arange(40000.0)[:, None]
    values, indices = select(torch.ones(rows, 1), W, None, 9)
    assert indices.tolist() == [list(range(39999, 39990, -1))] * rows
    assert values[1].tolist() == indices[1].tolist()


def test_equal_scores_overflow_every_list(on_host: OnHost, small_tiles: None) -> None:
    # Nothing but the latent tells them apart, within a tile and between tiles.
    _, indices = select(torch.zeros(3, 1), torch.ones(9000, 1), None, 200)
    assert indices.tolist() == [list(range(200))] * 3


@pytest.mark.parametrize("payload", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], ids=hex)
def test_nan_of_any_payload_ranks_first(payload: int, on_host: OnHost, small_tiles: None) -> None:
    bias = torch.full((200,), -torch.inf)
    bias[[5, 70, 199]] = torch.tensor([payload], dtype=torch.uint32).view(torch.float32)
    bias[[0, 100]] = torch.tensor([torch.inf, 1.0])
    values, indices = select(torch.zeros(2, 1), torch.zeros(200, 1), bias, 7)
    assert indices.tolist() == [[5, 70, 199, 0, 100, 1, 2]] * 2
    assert values[0].isnan().tolist() == [True] * 3 + [False] * 4
    assert values[0, 3:].tolist() == [torch.inf, 1.0, -torch.inf, -torch.inf]


def test_more_nan_than_are_kept(on_host: OnHost, small_tiles: None) -> None:
    # Once the k-th is NaN, +inf cannot win and a later NaN neither.
    bias = torch.full((400,), torch.nan)
    bias[::3] = torch.inf
    _, indices = select(torch.zeros(1, 1), torch.zeros(400, 1), bias, 100)
    assert indices[0].tolist() == [f for f in range(400) if f % 3][:100]


def test_a_scale_makes_keys_nan_and_leaves_values(on_host: OnHost) -> None:
    bias, scale = torch.tensor([1.0, torch.inf, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    values, indices = select(torch.zeros(1, 1), torch.zeros(3, 1), bias, 2, scale)
    assert indices.tolist() == [[1, 2]]
    assert values.tolist() == [[torch.inf, 2.0]]


def test_inputs_that_are_views(on_host: OnHost, small_tiles: None) -> None:
    # A bias that begins between two multiples of 16 bytes, and operands out of order.
    x, W, b = Case("views", 9, 24, 130, 1).inputs()
    assert b is not None
    scale = torch.rand(133)[3:]
    shifted = torch.cat([torch.full((1,), torch.nan), b])[1:]
    assert shifted.data_ptr() % 16 != 0
    came = select(x.T.contiguous().T, W.T.contiguous().T, shifted, 11, scale)
    wanted = select(x, W, b, 11, scale.clone())
    assert_bitwise("values", came[0], wanted[0])
    assert_bitwise("indices", came[1], wanted[1])


@pytest.mark.parametrize("schedule", range(1, 8))
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_no_order_of_threads_changes_a_bit(
    schedule: int, scaled: bool, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, b = Case("orders", 9, 3, 2500, 1, "integer").inputs()
    scale = (torch.arange(2500) % 5).float() if scaled else None
    monkeypatch.setattr(tiles, "tile_shape", lambda B, F: (9, 1300))
    for k in (1, 40, 300, 600):
        on_host.schedule = 0
        first = select(x, W, b, k, scale)
        on_host.schedule = schedule
        again = select(x, W, b, k, scale)
        assert_bitwise("values", again[0], first[0])
        assert_bitwise("indices", again[1], first[1])


@pytest.mark.parametrize("B", [1, 7, 1024, 5000, 2**17])
@pytest.mark.parametrize("F", [1, 3, 4, 5, 65536, 2**21 + 1])
def test_tiles_stay_in_the_scratch_buffer(B: int, F: int) -> None:
    rows, columns = tiles.tile_shape(B, F)
    assert 4 * rows * columns <= 24 << 20
    assert 1 <= rows <= B
    assert columns % 4 == 0
    assert columns >= min(F, 2048)


@pytest.fixture
def products() -> Iterator[Any]:
    """torch's settings of products on GPUs, put back afterwards."""
    settings, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    yield settings
    torch.set_float32_matmul_precision(before)
    if hasattr(settings, "allow_fp16_accumulation"):
        settings.allow_fp16_accumulation = False


def test_what_it_refuses_and_why(on_host: OnHost, products: Any) -> None:
    x, W = torch.ones(1, 2), torch.ones(4097, 2)
    with pytest.raises(BackendUnavailableError, match="cuda: k = 4097 is more than 4096"):
        select(x, W, None, 4097)
    torch.set_float32_matmul_precision("high")
    with pytest.raises(BackendUnavailableError, match=r"cuda: torch may round fp32 .* to TF32"):
        select(x, W, None, 1)
    assert select(x.bfloat16(), W.bfloat16(), None, 1)[1].tolist() == [[0]]
    if not hasattr(products, "allow_fp16_accumulation"):
        return  # torch 2.6 always adds in fp32
    products.allow_fp16_accumulation = True
    with pytest.raises(BackendUnavailableError, match="cuda: torch may add in fp16"):
        select(x.half(), W.half(), None, 1)
