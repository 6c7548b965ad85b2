"""select_topk by cuBLAS and a CUDA C++ kernel, a tile of scores after the other.

cuBLAS makes the scores of one tile of latents after the other, in a scratch buffer that fits the
GPU's L2 cache, and csrc/cuda/select_tile.cu folds each into the running top-k of its rows: the
scores are never in memory, let alone all of them. As the products are cuBLAS's, which picks its
kernels by shape, the last bits of a row's values may depend on the batch around it.
"""

from __future__ import annotations

import os

import torch

from sae_kernels import gpu
from sae_kernels.backends import cuda

_SCRATCH_BYTES = 24 << 20  # half of the L2 cache of an H100, and less of what came after
_MOST_ROWS = 1024  # so that W is read seldom, and a row's part of a tile is long
_MOST_KEPT = 4096  # twice as many candidates must fit a block's shared memory on every GPU
_FEWEST_CANDIDATES = 512


def refuses(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
    narrow: torch.Tensor | None = None,
    by_magnitude: bool = False,
    floor: torch.Tensor | None = None,
) -> str | None:
    """Why this call cannot run, or None."""
    if by_magnitude:
        return "it ranks by the score, not by its magnitude"
    if k > _MOST_KEPT:
        return f"k = {k} is more than {_MOST_KEPT}, for which its lists have room"
    products = torch.backends.cuda.matmul
    old = not hasattr(products, "fp32_precision")  # before torch 2.9
    tf32 = products.allow_tf32 if old else products.fp32_precision == "tf32"
    if x.dtype == torch.float32 and tf32:
        return (
            "torch may round fp32 operands to TF32: torch.set_float32_matmul_precision('highest')"
        )
    # Not a setting before torch 2.7.
    if x.dtype == torch.float16 and getattr(products, "allow_fp16_accumulation", False):
        return "torch may add in fp16: set torch.backends.cuda.matmul.allow_fp16_accumulation=False"
    repeatable = os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
    if x.is_cuda and torch.are_deterministic_algorithms_enabled() and not repeatable:
        return "deterministic algorithms are asked of cuBLAS: set CUBLAS_WORKSPACE_CONFIG=:4096:8"
    return None


def run(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None,
    narrow: torch.Tensor | None = None,
    by_magnitude: bool = False,
    floor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs csrc/cuda/select_tile.cu, a chunk of rows and a tile of latents at a time."""
    x, W = x.contiguous(), W.contiguous()
    b, rank_scale = _aligned(b), _aligned(rank_scale)
    (B, _), F = x.shape, W.shape[0]
    values = x.new_empty((B, k), dtype=torch.float32)
    indices = x.new_empty((B, k), dtype=torch.int32)
    rows, columns = tile_shape(B, F)
    scores = x.new_empty((rows, columns), dtype=torch.float32)
    best_keys = x.new_empty((rows, k), dtype=torch.int64)
    best_values = None if rank_scale is None else x.new_empty((rows, k), dtype=torch.float32)
    capacity = max(_FEWEST_CANDIDATES, gpu.next_power_of_two(2 * k))
    threads = 128 if k <= 512 and rows >= gpu.multiprocessors(x.device) else 512
    for row in range(0, B, rows):
        chunk = x[row : row + rows]
        for first in range(0, F, columns):
            tile = W[first : first + columns]
            product(chunk, tile, scores[: chunk.shape[0], : tile.shape[0]])
            last = first + columns >= F
            cuda.launch(
                "select_tile" if rank_scale is None else "select_tile_scaled",
                chunk.shape[0],
                threads,
                capacity * (8 if rank_scale is None else 12),
                scores,
                columns,
                None if b is None else b[first:],
                None if rank_scale is None else rank_scale[first:],
                best_keys,
                best_values,
                values[row:] if last else None,
                indices[row:] if last else None,
                first,
                tile.shape[0],
                k,
                capacity,
            )
    return values, indices


def tile_shape(B: int, F: int) -> tuple[int, int]:
    """Rows and latents of a tile; the latents in fours, so that 16-byte loads stay aligned."""
    rows = max(1, min(B, _MOST_ROWS))
    columns = _SCRATCH_BYTES // (4 * rows) // 256 * 256
    return rows, min(columns, (F + 3) // 4 * 4)


def product(x: torch.Tensor, W: torch.Tensor, out: torch.Tensor) -> None:
    """``x W^T`` with sums and results in fp32, into a part of a larger buffer."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, W.T, out_dtype=torch.float32, out=out)
    else:  # on the CPU the kernels are only checked, and torch has no such product there
        torch.mm(x.float(), W.float().T, out=out)


def _aligned(vector: torch.Tensor | None) -> torch.Tensor | None:
    """The vector in order and aligned to 16 bytes, which a view need not be."""
    if vector is None:
        return None
    vector = vector.contiguous()
    return vector if vector.data_ptr() % 16 == 0 else vector.clone()
