"""Tiled products in Triton, as every kernel that multiplies on the matrix units does them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_kernels import gpu


class ProductTile(NamedTuple):
    """A block's share of a product x W^T and what it is launched with.

    Attributes:
        rows, columns: tokens and latents.
        depth: bytes of d_in that are loaded at a time.
        warps, stages: of the launch.
        chunks: parts of the columns whose entries are let through one after the other.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    chunks: int


# The largest tiles without spills. Accumulators take rows * columns / (32 * warps) registers of a
# thread's 255, on sm_100 only while entries are let through (in smaller chunks for that).
_TILES = {
    0: ProductTile(64, 256, 1024, 4, 1, 2),  # Triton's interpreter: few large operations
    90: ProductTile(128, 256, 128, 8, 3, 4),
    100: ProductTile(128, 256, 128, 8, 3, 8),
}
_POINTER_TILE = ProductTile(128, 128, 128, 8, 3, 2)  # addresses take registers
_FP32_TILE = ProductTile(64, 64, 128, 8, 3, 1)  # no matrix unit multiplies fp32 without rounding it
_GROUP = 8  # tiles of rows that share the same latents while these are in cache


def _described(x: torch.Tensor, W: torch.Tensor) -> bool:
    # Without the tensor memory accelerator (sm_80) descriptors are slower than pointers.
    return _family() in _TILES and describable(x, W)


def _family() -> int:
    return gpu.architecture() // 10 * 10  # what holds for sm_100 holds for sm_103


def tile_for(x: torch.Tensor, W: torch.Tensor) -> ProductTile:
    """The tile of these operands on this architecture."""
    if gpu.interpreted():
        return _TILES[0]
    if x.dtype == torch.float32:
        return _FP32_TILE
    return _TILES[_family()] if _described(x, W) else _POINTER_TILE


def describable(*matrices: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator reads them: rows of whole 16 bytes, aligned.

    What is not contiguous will be copied to where it is aligned.
    """
    return all(
        matrix.shape[1] * matrix.element_size() % 16 == 0
        and (matrix.data_ptr() % 16 == 0 or not matrix.is_contiguous())
        for matrix in matrices
    )


def tiled(
    x: torch.Tensor, W: torch.Tensor, tile: ProductTile
) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Arguments and constants with which a kernel that calls `scores` is launched."""
    depth, is_described = tile.depth // x.element_size(), _described(x, W)
    matrices: tuple[Any, Any] = (x, W)
    if is_described:
        rows = (tile.rows, tile.columns)
        matrices = tuple(
            TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], [n, depth])
            for matrix, n in zip((x, W), rows, strict=True)
        )
    return matrices, {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": depth,
        "GROUP": _GROUP,
        "DESCRIBED": is_described,
        "WIDEN": gpu.interpreted(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):
    """Computes ``acc + a b``, sums in fp32 and fp32 operands unrounded; sums of int8 in int32.

    WIDEN: Triton's interpreter multiplies the bit patterns of bf16.
    """
    if WIDEN and a.dtype != tl.int8:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _no_sums(dtype: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    return tl.zeros((rows, columns), tl.int32 if dtype == tl.int8 else tl.float32)


@triton.jit
def product(x, W, rows, columns, D, DEPTH: tl.constexpr, WIDEN: tl.constexpr):
    """Products ``<x[rows], W[columns]>`` for any rows of two matrices of width D; all exist."""
    inputs = tl.arange(0, DEPTH)
    x_rows = x + rows.to(tl.int64)[:, None] * D
    W_rows = W + columns.to(tl.int64)[:, None] * D
    h = _no_sums(x.dtype.element_ty, rows.shape[0], columns.shape[0])
    for start in range(0, D, DEPTH):
        part = start + inputs[None, :]
        tokens = tl.load(x_rows + part, mask=part < D, other=0)
        latents = tl.load(W_rows + part, mask=part < D, other=0)
        h = dot(tokens, latents.T, h, WIDEN)
    return h


@triton.jit
def scores(
    x,
    W,
    row,
    column,
    B,
    F,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of the product x W^T; beyond the last token or latent it holds anything."""
    if DESCRIBED:
        h = _no_sums(x.dtype, ROWS, COLUMNS)
        for part in range(0, D, DEPTH):
            h = dot(x.load([row, part]), W.load([column, part]).T, h, WIDEN)
        return h
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), B - 1)
        columns = tl.minimum(column + tl.arange(0, COLUMNS), F - 1)
        return product(x, W, rows, columns, D, DEPTH, WIDEN)
