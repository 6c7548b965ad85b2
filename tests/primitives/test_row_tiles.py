"""Tiles of the Triton kernels on rows: how many of their columns are there."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the tiles are those of the Triton kernels")

from benchmarks.kernel_table import WIDTHS
from sae_kernels.primitives.row_grad.triton import RowTile, beside_products, blocks, whole


def columns(tile: RowTile) -> int:
    return tile.columns + tile.rest


def test_a_tile_of_a_whole_row_has_all_columns_and_few_more() -> None:
    for width in range(1, 8193):
        tile = whole(width)
        assert width <= columns(tile)
        assert columns(tile) <= (width * 4 / 3 if width > 512 else 2 * width)
        threads = 32 * tile.warps
        # A thread's columns of the second block are neighbours, two or four of them.
        assert tile.rest == 0 or tile.rest // threads in (2, 4)
        assert tile.rest == 0 or tile.columns == 8 * threads


@pytest.mark.parametrize("width", WIDTHS)
def test_usual_widths_leave_few_lanes_idle(width: int) -> None:
    assert columns(whole(width)) <= 1.15 * width
    for tile in (blocks(width), beside_products(width)):
        assert width <= -(-width // tile.columns) * tile.columns <= 1.15 * width
