"""decode_residual in Triton: every selected decoder row is read once, if a token's rows fit.

Ragged codes, groups of latents and more rows than fit take three kernels: decode, one that makes
residuals of the reconstructions, and code_grad.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.code_grad import triton as code_grad
from sae_kernels.primitives.decode import triton as decode
from sae_kernels.primitives.decode.triton import block_of_columns, latents_of, load_rows
from sae_kernels.primitives.tensors import packed

# Above it a block of all rows would be narrower than the 64 bytes that memory hands out at once.
MOST_FUSED = 256
_WIDEST = 1024  # columns that are compared at a time
_COLUMNS_A_WARP = 128  # loads of 16 bytes


@triton.jit
def _decode_residual_kernel(
    values,
    indices,
    W,
    b_dec,
    target,
    residual,
    sse,
    code_grad,
    F,
    K,
    D: tl.constexpr,
    DROP_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # A block of columns of all rows stays in registers between its two uses: the reconstruction and
    # the products with the residual. The products of one 16-byte load lie in one thread and are
    # added there at once, which leaves room for a larger block; threads exchange totals at the end.
    # Registers would still limit the loads in flight, and adding rows across threads stalls them,
    # so the next blocks are fetched into shared memory meanwhile.
    token = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, ROWS)
    latents = latents_of(indices, token * K + entries, entries < K, None, F, 1)
    coef = tl.load(values + token * K + entries, mask=entries < K, other=0)
    live = coef != 0
    dropped = ~live & DROP_ZEROS
    coef = tl.where(live & (latents < 0), float("nan"), coef)
    products = tl.zeros((ROWS, BLOCK // VECTOR), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, D, BLOCK, num_stages=3):
        columns, inside = block_of_columns(first, D, BLOCK)
        rows = load_rows(W, latents, ~dropped, columns, inside, D)
        terms = coef[:, None] * rows
        if not DROP_ZEROS:
            terms = tl.where(live[:, None], terms, 0)
        e = tl.sum(terms, 0)
        if b_dec is not None:
            e += tl.load(b_dec + columns, mask=inside, other=0)
        e -= tl.load(target + token * D + columns, mask=inside, other=0)
        e = tl.where(inside, e, 0)  # an infinite coefficient makes NaN of masked columns
        tl.store(residual + token * D + columns, e, mask=inside)
        squares += e * e
        by_load = tl.reshape(rows * e[None, :], (ROWS, BLOCK // VECTOR, VECTOR))
        products += tl.sum(by_load, 2)
    tl.store(sse + token, tl.sum(squares, 0))
    total = tl.where(latents < 0, float("nan"), tl.sum(products, 1))
    tl.store(code_grad + token * K + entries, tl.where(dropped, 0, total), mask=entries < K)


@triton.jit
def _residual_kernel(
    x_hat,
    target,
    group_weights,
    sse,
    B,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # From the last prefix to the first: each adds what the one after it has left in memory.
    token = tl.program_id(0).to(tl.int64)
    for nth in range(GROUPS):
        g = GROUPS - 1 - nth
        squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, D, BLOCK):
            columns, inside = block_of_columns(first, D, BLOCK)
            at = x_hat + (g * B + token) * D + columns
            after = x_hat + ((g + 1) * B + token) * D + columns
            e = tl.load(at, mask=inside, other=0)
            e -= tl.load(target + token * D + columns, mask=inside, other=0)
            squares += e * e
            if group_weights is not None:
                e *= tl.load(group_weights + g)
            e += tl.load(after, mask=inside & (nth > 0), other=0)
            tl.store(at, e, mask=inside)
        tl.store(sse + g * B + token, tl.sum(squares, 0))
        tl.debug_barrier()  # another thread may load what this one has stored


def run(
    values: torch.Tensor,
    indices: torch.Tensor,
    W: torch.Tensor,
    b_dec: torch.Tensor | None,
    target: torch.Tensor,
    drop_zeros: bool,
    group_ends: torch.Tensor | None = None,
    group_weights: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    blocks: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes residual, squared error and code gradients; a program takes a token."""
    in_parts = group_ends is not None or offsets is not None or blocks > 1
    if in_parts or values.shape[1] > MOST_FUSED:
        e = decode.run(values, indices, W, b_dec, group_ends, offsets, blocks)
        sse = _compare(e, target, group_weights)
        grad = code_grad.run(e, indices, W, group_ends, offsets)
        return e, sse, torch.where(values == 0, 0, grad) if drop_zeros else grad
    (B, K), (F, D) = values.shape, W.shape
    sse, grad = values.new_empty((B,)), values.new_empty((B, K))
    rows, columns, warps = decode.tile(gpu.next_power_of_two(K), D)
    e = values.new_empty((B, D))
    _decode_residual_kernel[(B,)](
        values.contiguous(),
        indices.contiguous(),
        W.contiguous(),
        packed(b_dec),
        target.contiguous(),
        e,
        sse,
        grad,
        F,
        K,
        D=D,
        DROP_ZEROS=drop_zeros,
        ROWS=rows,
        BLOCK=columns,
        VECTOR=16 // W.element_size(),
        num_warps=warps,
    )
    return e, sse, grad


def _compare(
    x_hat: torch.Tensor, target: torch.Tensor, group_weights: torch.Tensor | None
) -> torch.Tensor:
    """Replaces reconstructions [B, D] or [G, B, D] by residuals and returns the squared errors."""
    sse = x_hat.new_empty(x_hat.shape[:-1])
    B, D = target.shape
    block = min(_WIDEST, gpu.next_power_of_two(D))
    _residual_kernel[(B,)](
        x_hat,
        target.contiguous(),
        packed(group_weights),
        sse,
        B,
        D=D,
        GROUPS=x_hat.shape[0] if x_hat.dim() == 3 else 1,
        BLOCK=block,
        # A warp without columns of its own would repeat another's, and might load what that one has
        # already replaced.
        num_warps=max(1, min(4, block // _COLUMNS_A_WARP)),
    )
    return sse
