"""Arithmetic on places in dictionaries too large to multiply here."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from emulator import triton_driver
from sae_kernels.primitives import schedule
from sae_kernels.primitives.select_topk.triton import tile_at


@triton.jit
def _place_of(
    out, tile, B, F, start, stop, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, column = tile_at(tile, B, F, (start, stop, stride), ROWS, COLUMNS, 8)
    tl.store(out, row)
    tl.store(out + 1, column)


@pytest.mark.full
@pytest.mark.parametrize("F", [3_900_000, 16_000_000])
def test_a_visit_of_millions_of_latents_reaches_the_right_tile(F: int) -> None:
    n_tiles = -(-F // 64)
    stride = schedule.stride(n_tiles)
    first = n_tiles - 7
    assert first * stride > 2**31
    with triton_driver.emulated(80):
        for tile in range(7):
            out = torch.zeros(2, dtype=torch.int32)
            _place_of[(1,)](out, tile, 100, F, first, n_tiles, stride, 128, 64)
            assert out.tolist() == [0, (first + tile) * stride % n_tiles * 64]
