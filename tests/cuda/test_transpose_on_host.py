"""The radix sort of codes, run on the host, against a sort written out in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.primitives.transpose_codes import cuda as sort
from sae_kernels.primitives.transpose_codes import transpose_codes
from sae_kernels.testing import assert_bitwise
from tests.primitives.transposing import SHAPES, expected, make

if TYPE_CHECKING:
    from tests.cuda.conftest import OnHost

Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Beside the shapes of all backends: one latent; two and three passes; many warps, some without a
# code; codes that end inside a warp's round.
MORE = ((50, 7, 1), (60, 5, 300), (33, 40, 70000), (2000, 2, 257), (257, 1, 256))


def check(
    indices: torch.Tensor,
    values: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    n_latents: int,
) -> Index:
    """Compares all of the index, what lies past its end included."""
    index: Index = transpose_codes(indices, values, row_ids, n_latents, backend="cuda")
    in_range = (indices >= 0) & (indices < n_latents)
    kept = in_range.float() if values is None else values * in_range
    lists = expected(indices.clamp(0, n_latents - 1), kept, row_ids, n_latents)
    flat = [pair for pairs in lists for pair in pairs]
    padding = [0] * (indices.numel() - len(flat))
    lengths = torch.tensor([len(pairs) for pairs in lists])
    assert index[0].tolist() == [0, *lengths.cumsum(0).tolist()]
    assert index[1].tolist() == [entry for entry, _ in flat] + padding
    assert index[2].tolist() == [row for _, row in flat] + padding
    return index


@pytest.mark.parametrize("shape", SHAPES + MORE, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dropping", ["all", "float32", "float64"])
@pytest.mark.parametrize("own_rows", [False, True], ids=["token-rows", "given-rows"])
def test_against_python(
    shape: tuple[int, int, int], dropping: str, own_rows: bool, on_host: OnHost
) -> None:
    indices, values = make(shape)
    kept = None if dropping == "all" else values.to(getattr(torch, dropping))
    row_ids = torch.randint(0, 99, shape[:2], dtype=torch.int32) if own_rows else None
    check(indices, kept, row_ids, shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_zeros_of_either_sign_are_dropped(dtype: torch.dtype, on_host: OnHost) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    kept = [smallest, -smallest, torch.nan, -torch.inf, torch.finfo(dtype).smallest_normal]
    values = torch.tensor([[0.0, -0.0, *kept]], dtype=dtype)
    index = transpose_codes(torch.zeros(1, 7, dtype=torch.int32), values, None, 1, backend="cuda")
    assert index[0].tolist() == [0, 5]
    assert index[1].tolist() == [2, 3, 4, 5, 6, 0, 0]


def test_all_codes_on_one_latent_keep_their_order(on_host: OnHost) -> None:
    indices = torch.full((3000, 3), 12345, dtype=torch.int32)
    offsets, entries, _ = check(indices, None, None, 70000)
    assert entries.tolist() == list(range(9000))
    assert offsets[[0, 12345, 12346, 70000]].tolist() == [0, 0, 9000, 9000]


def test_nothing_is_kept(on_host: OnHost) -> None:
    check(torch.zeros(40, 4, dtype=torch.int32), torch.zeros(40, 4), None, 70000)


def test_indices_that_are_no_latents_are_left_out(on_host: OnHost) -> None:
    indices = torch.randint(-3, 303, (200, 4), dtype=torch.int32)
    indices[0] = torch.tensor([-1, 300, 2**31 - 1, -(2**31)])
    offsets, _, _ = check(indices, torch.randn(200, 4), None, 300)
    assert 700 < int(offsets[-1]) < 800


def test_several_sets_laid_end_to_end(on_host: OnHost) -> None:
    indices = torch.randint(0, 40, (777,), dtype=torch.int32)
    check(indices, torch.randn(777), torch.randint(0, 9, (777,), dtype=torch.int32), 40)


def test_inputs_that_are_views(on_host: OnHost) -> None:
    indices, values = make((50, 6, 300))
    wanted = check(indices, values, None, 300)
    views = (t.T.contiguous().T for t in (indices, values))
    came = transpose_codes(*views, None, 300, backend="cuda")
    for name, a, b in zip(("offsets", "entries", "rows"), came, wanted, strict=True):
        assert_bitwise(name, a, b)


@pytest.mark.parametrize("most_parts", [1, 24, 2048])
def test_any_number_of_parts_gives_the_same_index(
    most_parts: int, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sort, "_MOST_PARTS", most_parts)
    monkeypatch.setattr(sort, "_FEWEST_CODES", 5)
    indices, values = make((611, 5, 900))
    check(indices, values, None, 900)


@pytest.mark.parametrize("schedule", range(1, 8))
def test_no_order_of_threads_changes_a_bit(schedule: int, on_host: OnHost) -> None:
    indices, values = make((900, 4, 70000))
    indices[::2] = 7  # many lanes with the same digits
    wanted = check(indices, values, None, 70000)
    on_host.schedule = schedule
    came = transpose_codes(indices, values, None, 70000, backend="cuda")
    for name, a, b in zip(("offsets", "entries", "rows"), came, wanted, strict=True):
        assert_bitwise(name, a, b)


@pytest.mark.parametrize(
    ("n_latents", "passes"), [(1, 1), (256, 1), (257, 2), (2**16, 2), (2**16 + 1, 3)]
)
def test_as_many_passes_as_a_latent_has_digits(
    n_latents: int, passes: int, on_host: OnHost
) -> None:
    check(torch.randint(0, n_latents, (30, 3), dtype=torch.int32), None, None, n_latents)
    assert on_host.launches.count("transpose_move") == passes
