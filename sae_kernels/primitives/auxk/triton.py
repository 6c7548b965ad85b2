"""auxk in Triton: five kernels that end at once where there is no dead latent.

The host does not know how many latents are dead and a step must not wait to ask. So every kernel is
launched for all places and reads the count: with an empty set AuxK costs its launches. Rows of the
weights are gathered by the products themselves; codes are dense over the compact set, for with k
near d_in / 2 of a few thousand latents dense products beat gathers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.checks import gradient_operand
from sae_kernels.primitives.products import dot, product

# Bytes of the codes of the tokens that are worked on at a time.
_TILE_BYTES = 128 << 20
_MOST_PLACES = 16384  # one program ranks a token's scores in its registers


@triton.jit
def _scores(
    x, W_enc, b_enc, latents, count, scores, T, D, A,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes scores[t, j] = <x[t], W_enc[latents[j]]> + b_enc[latents[j]] for the j in use."""
    n = tl.load(count)
    first = tl.program_id(1) * BN
    if first >= n:
        return
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = first + tl.arange(0, BN)
    row = tl.load(latents + j, mask=j < n, other=0).to(tl.int64)
    h = product(x, W_enc, tl.minimum(t, T - 1), row, D, BK, WIDEN)
    h += tl.load(b_enc + row, mask=j < n, other=0.0)
    tl.store(scores + t[:, None] * A + j, h, mask=(t[:, None] < T) & (j < n))


@triton.jit
def _keep(scores, codes, count, k, A, OPERAND: tl.constexpr, BLOCK: tl.constexpr):
    """The k largest positive scores of a token as codes, zeros in the other places in use.

    Positive floats order as their bits do, and NaN is put above them all. The key that the last
    place goes to is found bit by bit; of keys equal to it the first latents are kept.
    """
    n = tl.load(count)
    if n == 0:
        return
    j = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * A + j
    h = tl.load(scores + at, mask=j < n, other=0.0)
    key = tl.where(h != h, 0x7FFFFFFF, tl.where(h > 0, h, 0.0).to(tl.int32, bitcast=True))
    cut = 0
    for bit in range(30, -1, -1):
        higher = cut | (1 << bit)
        cut = tl.where(tl.sum((key >= higher).to(tl.int32)) >= k, higher, cut)
    ties = k - tl.sum((key > cut).to(tl.int32))
    tied = (key == cut) & (j < n)
    kept = (key > cut) | (tied & (tl.cumsum(tied.to(tl.int32)) <= ties))
    code = tl.where(kept & (key > 0), h, 0.0).to(OPERAND)
    tl.store(codes + at, code.to(codes.dtype.element_ty), mask=j < n)


@triton.jit
def _variance(residual, count, parts, B, D, BM: tl.constexpr, BN: tl.constexpr):
    """Sums the squared deviations of some columns of the residual from their means."""
    total = 0.0
    if tl.load(count) > 0:
        d = tl.program_id(0) * BN + tl.arange(0, BN)
        t = tl.arange(0, BM)
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, B, BM):
            row = (start + t).to(tl.int64)
            mask = (row[:, None] < B) & (d < D)
            acc += tl.load(residual + row[:, None] * D + d, mask=mask, other=0.0)
        mean = tl.sum(acc, 0) / B
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, B, BM):
            row = (start + t).to(tl.int64)
            mask = (row[:, None] < B) & (d < D)
            r = tl.load(residual + row[:, None] * D + d, mask=mask, other=0.0)
            acc += tl.where(mask, (r - mean) * (r - mean), 0.0)
        total = tl.sum(tl.sum(acc, 0))
    tl.store(parts + tl.program_id(0), total)


@triton.jit
def _weight(parts, n, k, alpha, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.arange(0, BLOCK)
    variance = tl.sum(tl.load(parts + p, mask=p < PARTS, other=0.0))
    return alpha * tl.minimum(n / k, 1.0) / variance


@triton.jit
def _error(
    codes, W_dec, latents, count, residual, parts, grad, loss, T, D, A, k, alpha,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes dL/de with e = codes W_dec, and this tile's part of the loss."""
    n = tl.load(count)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if n == 0:
        tl.store(loss + part, 0.0)
        return
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, n, BK):
        j = start + tl.arange(0, BK)
        row = tl.load(latents + j, mask=j < n, other=0).to(tl.int64)
        a = tl.load(codes + t[:, None] * A + j, mask=(t[:, None] < T) & (j < n), other=0.0)
        w = tl.load(W_dec + row[:, None] * D + d, mask=(j[:, None] < n) & (d < D), other=0.0)
        acc = dot(a, w, acc, WIDEN)
    at, mask = t[:, None] * D + d, (t[:, None] < T) & (d < D)
    error = tl.where(mask, acc + tl.load(residual + at, mask=mask, other=0.0), 0.0)
    weight = _weight(parts, n, k, alpha, PARTS, BLOCK)
    tl.store(loss + part, weight * tl.sum(tl.sum(error * error, 1)))
    tl.store(grad + at, (2 * weight * error).to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _code_grad(
    grad, W_dec, latents, count, codes, T, D, A,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Puts dL/dcodes in the place of the codes that are not zero."""
    n = tl.load(count)
    first = tl.program_id(1) * BN
    if first >= n:
        return
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = first + tl.arange(0, BN)
    row = tl.load(latents + j, mask=j < n, other=0).to(tl.int64)
    dh = product(grad, W_dec, tl.minimum(t, T - 1), row, D, BK, WIDEN)
    at, mask = t[:, None] * A + j, (t[:, None] < T) & (j < n)
    fired = tl.load(codes + at, mask=mask, other=0.0) != 0
    tl.store(codes + at, tl.where(fired, dh, 0.0).to(codes.dtype.element_ty), mask=mask)


@triton.jit
def _row_grad(
    coef, source, count, out, sums, T, D, A,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out[j] (+)= sum_t coef[t, j] source[t]; sums[j], if asked for, (+)= sum_t coef[t, j]."""
    n = tl.load(count)
    first = tl.program_id(0) * BM
    if first >= n:
        return
    j = first + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, T, BK):
        t = (start + tl.arange(0, BK)).to(tl.int64)
        c = tl.load(coef + t[:, None] * A + j, mask=(t[:, None] < T) & (j < n), other=0.0)
        s = tl.load(source + t[:, None] * D + d, mask=(t[:, None] < T) & (d < D), other=0.0)
        acc = dot(c.T, s, acc, WIDEN)
        if sums is not None:
            total += tl.sum(c.to(tl.float32), 0)
    at, mask = j[:, None] * D + d, (j[:, None] < n) & (d < D)
    if ADD:
        acc += tl.load(out + at, mask=mask, other=0.0)
    tl.store(out + at, acc, mask=mask)
    if sums is not None and tl.program_id(1) == 0:
        if ADD:
            total += tl.load(sums + j, mask=j < n, other=0.0)
        tl.store(sums + j, total, mask=j < n)


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    # fp32 products run on the ordinary units, whose operands come from registers.
    if gpu.interpreted() or dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    if gpu.architecture() < 90:
        return {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 3}
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


class _Dead(NamedTuple):
    """The dead latents' matrices, numbers and count, and the weight of their loss."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    latents: torch.Tensor  # rows of W_enc and b_enc
    W_dec: torch.Tensor
    places: torch.Tensor  # rows of W_dec
    n_dead: torch.Tensor
    k: int
    alpha: float
    variance: torch.Tensor  # of the residual, in parts


class _Gradients(NamedTuple):
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor


def refuses(
    x: torch.Tensor,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    latents: torch.Tensor,
    *_: object,
) -> str | None:
    """Why these arguments are out of the kernels' range, or None."""
    if residual.shape != x.shape:
        return f"it takes targets as wide as the tokens, got {residual.shape[1]} and {x.shape[1]}"
    if latents.shape[0] > _MOST_PLACES:
        return f"at most {_MOST_PLACES} dead latents at a time, got {latents.shape[0]}"
    return None


def run(
    x: torch.Tensor,
    residual: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    latents: torch.Tensor,
    count: torch.Tensor,
    k: int,
    alpha: float,
    variance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the kernels for the tokens, some at a time."""
    x, residual = x.contiguous(), residual.contiguous()
    (B, D), A = x.shape, latents.shape[0]
    rows = residual.new_empty(A, D)
    gradients = _Gradients(rows, residual.new_empty(A), torch.empty_like(rows))
    if B == 0 or A == 0:
        for gradient in gradients:
            gradient.zero_()
        return residual.new_zeros(()), *gradients
    if variance is None:
        # Eight columns of fp32 are the 32 bytes that memory is read by: as many programs as can be.
        n_parts = -(-D // 8)
        variance = residual.new_empty(n_parts)
        _variance[(n_parts,)](residual, count, variance, B, D, BM=256, BN=8, num_warps=4)
    places = latents
    if W_dec.dtype != gradient_operand(x.dtype):  # a cast inside a product would cost its pipeline
        W_dec = W_dec[latents.clamp(min=0)].to(x.dtype).to(gradient_operand(x.dtype))
        places = torch.arange(A, dtype=torch.int32, device=x.device)
    dead = _Dead(
        W_enc.contiguous(),
        b_enc.contiguous(),
        latents.contiguous(),
        W_dec.contiguous(),
        places.contiguous(),
        count,
        k,
        alpha,
        variance.reshape(-1),
    )
    share = max(64, _TILE_BYTES // (4 * A))
    losses = [
        _teach(
            x[first : first + share], residual[first : first + share], dead, gradients, first > 0
        )
        for first in range(0, B, share)
    ]
    return torch.cat(losses).sum(), *gradients


def _teach(
    x: torch.Tensor, residual: torch.Tensor, dead: _Dead, gradients: _Gradients, add: bool
) -> torch.Tensor:
    """Adds some tokens' gradients to the results, or stores them if they are the first."""
    (T, D), A = x.shape, dead.latents.shape[0]
    count, product = dead.n_dead, gradient_operand(x.dtype)
    encode, learn = _tiles(x.dtype), _tiles(product)
    upcast, operand = gpu.interpreted(), getattr(tl, str(x.dtype).removeprefix("torch."))
    scores = residual.new_empty((T, A))
    codes = x.new_empty((T, A), dtype=product)
    grad = torch.empty_like(x, dtype=product)

    def grid(rows: int, columns: int, tiles: dict[str, int]) -> tuple[int, int]:
        return -(-rows // tiles["BM"]), -(-columns // tiles["BN"])

    _scores[grid(T, A, encode)](
        x, dead.W_enc, dead.b_enc, dead.latents, count, scores, T, D, A, WIDEN=upcast, **encode
    )
    block = gpu.next_power_of_two(A)
    warps = min(16, max(4, block // 512))
    _keep[(T,)](scores, codes, count, dead.k, A, OPERAND=operand, BLOCK=block, num_warps=warps)
    tiles = grid(T, D, learn)
    loss = residual.new_empty(tiles[0] * tiles[1])
    n_parts = dead.variance.shape[0]
    _error[tiles](
        codes, dead.W_dec, dead.places, count, residual, dead.variance, grad, loss, T, D, A,
        dead.k, dead.alpha, PARTS=n_parts, BLOCK=gpu.next_power_of_two(n_parts), WIDEN=upcast,
        **learn,
    )  # fmt: skip
    _row_grad[grid(A, D, learn)](
        codes, grad, count, gradients.W_dec, None, T, D, A, ADD=add, WIDEN=upcast, **learn
    )
    _code_grad[grid(T, A, learn)](
        grad, dead.W_dec, dead.places, count, codes, T, D, A, WIDEN=upcast, **learn
    )
    _row_grad[grid(A, D, learn)](
        codes, x.to(product), count, gradients.W_enc, gradients.b_enc, T, D, A,
        ADD=add, WIDEN=upcast, **learn,
    )  # fmt: skip
    return loss
