"""A screen of scores on GPUs: a product of rounded rows bounds them from above.

No matrix unit multiplies fp32 without rounding it, and other units multiply ten times slower than
these do rows in bf16; rows in int8 they multiply in half the time of bf16. And few scores can win.
A score is above the product of the rounded rows by no more than the lengths of what rounding took
allow (docs/numerics.md). Entries whose upper bound reaches their row's threshold are appended to
the lists and scored there, in the order of sums of the product without a screen. So a list
holds what it would hold without the screen, and some entries more that do not win. Rows whose lists
overflow are scored again by the product without one. select_threshold does the same with the
entries whose upper bound is above their latent's, and leaves out those whose score is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.candidate_lists import bias, packed
from sae_kernels.primitives.products import product

if TYPE_CHECKING:
    from sae_kernels.primitives.candidate_lists import CandidateLists
    from sae_kernels.primitives.tensors import Ragged

# With fewer latents, what is scored in fp32 all the same is no small part; with fewer products
# the launches, 8 more in most calls, would take longer than what they spare.
FEWEST_LATENTS, LATENTS_PER_KEPT, FEWEST_PRODUCTS = 2048, 64, 1 << 31
_WIDEST = 1 << 15  # sums of more are not what the bound allows for
# Entries that a block scores at a time, a thread each; columns of a row that are rounded at a time.
_ENTRIES, _COLUMNS = 128, 1024
_DEPTH = 128  # bytes of a row that are scored at a time
# What operands of a dtype are rounded to. fp8 would lose several times as much as int8.
_NARROWER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.int8}
# An entry whose score is still to come has this bit in its latent's number.
UNSCORED = tl.constexpr(-(1 << 31))


class RoundedRows(NamedTuple):
    """Rounded rows and what is known of them, rounded up; NaN where nothing is.

    Attributes:
        rows: bf16 [n, D], or int8 with zeros up to whole 16 bytes, as `describable` wants them.
        length: fp32 [n], of the rows and of the rounded ones: not below either.
        lost: fp32 [n], the length of the difference; for latents with the error of sums in it.
        scale: fp32 [n], what rows in int8 are to be multiplied by; None in bf16.
    """

    rows: torch.Tensor
    length: torch.Tensor
    lost: torch.Tensor
    scale: torch.Tensor | None

    @property
    def known(self) -> tuple[torch.Tensor, ...]:
        """What `bounded` takes: the lengths and, of rows in int8, the scale."""
        return tuple(t for t in self[1:] if t is not None)


class Screen(NamedTuple):
    """The operands of a product that bounds scores: tokens and latents, both in one dtype."""

    x: RoundedRows
    W: RoundedRows

    def part(self, rows: slice) -> Screen:
        """The same for some of the tokens."""
        x = self.x
        scale = None if x.scale is None else x.scale[rows]
        return Screen(RoundedRows(x.rows[rows], x.length[rows], x.lost[rows], scale), self.W)


def note(dtype: torch.dtype, few: str) -> str | None:
    """What `explain` says of the screen; ``few`` says when few enough scores pass."""
    if dtype != torch.float32:
        return None
    return (
        f"screens scores in bf16, with the same results, from {FEWEST_LATENTS} latents and "
        f"{FEWEST_PRODUCTS:.0e} products on, {few}"
    )


def pays(x: torch.Tensor, k: int, n_latents: int) -> bool:
    """Whether so many tokens and latents are worth a screen; k is 0 where nobody knows it.

    In bf16 none are: what a screen in int8 could gain is little (docs/numerics.md), and the scores
    have the same bits only if a matrix unit's sum is the same in instructions of other sizes.
    """
    enough = n_latents >= max(FEWEST_LATENTS, LATENTS_PER_KEPT * k)
    return x.dtype == torch.float32 and enough and x.numel() * n_latents >= FEWEST_PRODUCTS


def screen_of(x: torch.Tensor, W: torch.Tensor) -> Screen | None:
    """Rounds packed operands for a screen; None without tokens, and where no bound is known."""
    if x.dtype not in _NARROWER or x.shape[1] > _WIDEST or x.shape[0] == 0:
        return None
    return Screen(rounded(x), rounded(W, error_of_sums(x.shape[1])))


def error_of_sums(width: int) -> float:
    """The share of two rows' lengths by which sums of their products may be off (docs/numerics.md).

    In fp32, on a matrix unit, and in evaluating the bound. Sums of int8 are exact.
    """
    return 1.01 * (5 * width + 128) * 2.0**-24


def rounded(matrix: torch.Tensor, error: float = 0.0) -> RoundedRows:
    """Rounds rows of fp32 to bf16 and of bf16 to int8.

    ``error`` times their length is added to what they lost.
    """
    n, D = matrix.shape
    dtype = _NARROWER[matrix.dtype]
    in_bytes = dtype == torch.int8
    width = -(-D // 16) * 16 if in_bytes else D
    length, lost, scale = matrix.new_empty((3, n), dtype=torch.float32)
    rows = matrix.new_empty((n, width), dtype=dtype)
    made = RoundedRows(rows, length, lost, scale if in_bytes else None)
    columns = min(_COLUMNS, gpu.next_power_of_two(width))
    _round_rows[(n,)](matrix, *made, D, error, COLUMNS=columns, num_warps=4)
    return made


@triton.jit
def _round_rows(matrix, rows, lengths, losts, scales, D, error, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    width, scale, inverse = D, 1.0, 1.0
    if scales is not None:
        width = tl.cdiv(D, 16) * 16
        most = 0.0
        for start in range(0, D, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            x = tl.load(matrix + row * D + columns, mask=columns < D, other=0).to(tl.float32)
            most = tl.maximum(most, tl.max(tl.abs(x)))
        if (most > 0) & (most < float("inf")):
            scale, inverse = most / 127, 127 / most
        tl.store(scales + row, scale)
    most, squares, lost = 0.0, 0.0, 0.0
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = tl.load(matrix + row * D + columns, mask=columns < D, other=0).to(tl.float32)
        if scales is None:
            near = x.to(tl.bfloat16)
            left = x - near.to(tl.float32)
        else:
            near = tl.floor(tl.fma(x, inverse, 0.5))
            left = tl.fma(-near, scale, x)
        there = columns < width
        tl.store(rows + row * width + columns, near.to(rows.dtype.element_ty), mask=there)
        most = tl.maximum(most, tl.max(tl.abs(x)))
        squares += tl.sum(x * x)
        lost += tl.sum(left * left)
    # Sums of D <= 2^15 squares, 1024 at a time, and their roots are off by far less than 2^-10.
    up = 1 + 2.0**-10
    lost = tl.sqrt(lost) * up
    length = tl.sqrt(squares) * up + lost
    # Where squares overflow or vanish, and where anything is NaN, no bound holds.
    holds = ((squares >= 2.0**-60) & (squares <= 2.0**120)) | ((squares == 0) & (most == 0))
    tl.store(lengths + row, tl.where(holds, length, float("nan")))
    tl.store(losts + row, tl.where(holds, lost + error * length, float("nan")))


@triton.jit
def bounded(product, lengths, rows, B, columns, end, scale):
    """What scores are at most, or at least where the scale turns their order around.

    Args:
        product: of some rounded rows and latents.
        lengths: those of the tokens and of the latents, what they lost and their scales.
        rows, columns: which they are; tokens end at B, latents at the end.
        scale: of the scores, 1 or [1, columns].
    """
    tokens, latents = lengths
    length = tl.load(tokens[0] + rows, mask=rows < B, other=0)[:, None]
    lost = tl.load(tokens[1] + rows, mask=rows < B, other=0)[:, None]
    other = tl.load(latents[0] + columns, mask=columns < end, other=0)[None, :]
    other_lost = tl.load(latents[1] + columns, mask=columns < end, other=0)[None, :]
    # Not left to the compiler: where a product is looked through twice, its bounds are the same.
    margin = tl.fma(length, other_lost, lost * other)
    margin = tl.where(scale < 0, -margin, margin)
    if product.dtype == tl.int32:
        token = tl.load(tokens[2] + rows, mask=rows < B, other=0)[:, None]
        latent = tl.load(latents[2] + columns, mask=columns < end, other=0)[None, :]
        return tl.fma(product.to(tl.float32) * token, latent, margin)
    else:
        return product + margin


def score_found(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, found: Ragged) -> None:
    """Puts scores into ragged codes in place of the bounds that a screen let through."""
    depth = _DEPTH // x.element_size()
    constants = {"ENTRIES": _ENTRIES, "DEPTH": depth, "WIDEN": gpu.interpreted()}
    _score_found[(x.shape[0],)](x, W, b, *found, *W.shape, **constants, num_warps=4)


@triton.jit
def _score_found(
    x,
    W,
    b,
    values,
    indices,
    offsets,
    F,
    D,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    end = tl.load(offsets + tl.program_id(0) + 1)
    for start in range(tl.load(offsets + tl.program_id(0)), end, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        columns = tl.load(indices + entries, mask=entries < end, other=0)
        h = _scores(x, W, b, columns, F, D, DEPTH, WIDEN)
        tl.store(values + entries, h, mask=entries < end)


@triton.jit
def _scores(x, W, b, columns, F, D, DEPTH: tl.constexpr, WIDEN: tl.constexpr):
    """Scores of this block's token in the order of sums of all scores' product; never -0.

    In bf16 W's rows are those of the matrix instruction and this token is each of its columns, as
    many as the products of few tokens have.
    """
    there = tl.minimum(columns, F - 1)
    if x.dtype.element_ty == tl.float32:
        h = product(x, W, tl.program_id(0) + tl.arange(0, 1), there, D, DEPTH, WIDEN)
        h = tl.reshape(h, (columns.shape[0],))
    else:
        h = product(W, x, there, tl.program_id(0) + tl.zeros((16,), tl.int32), D, DEPTH, WIDEN)
        h = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, h, 0.0), 1)
    return h + (bias(b, columns, F) + 0.0)


def score_unscored(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, lists: CandidateLists
) -> None:
    """Puts the scores of entries that a screen let through in the place of their bounds."""
    _score_unscored[(x.shape[0],)](
        x,
        W,
        b,
        lists.counts,
        lists.candidates,
        *W.shape,
        CAPACITY=lists.candidates.shape[1],
        ENTRIES=_ENTRIES,
        DEPTH=_DEPTH // x.element_size(),
        WIDEN=gpu.interpreted(),
        num_warps=4,
    )


@triton.jit
def _score_unscored(
    x,
    W,
    b,
    counts,
    candidates,
    F,
    D,
    CAPACITY: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    count = tl.minimum(tl.load(counts + tl.program_id(0)), CAPACITY)
    for start in range(0, count, ENTRIES):
        slots = start + tl.arange(0, ENTRIES)
        at = candidates + tl.program_id(0).to(tl.int64) * CAPACITY + slots
        entries = tl.load(at, mask=slots < count, other=0)
        if tl.min(entries) < 0:
            columns = (entries >> 32).to(tl.int32) & 0x7FFFFFFF
            # NaN lets columns beyond the last latent through, which the cut of the list drops.
            h = _scores(x, W, b, columns, F, D, DEPTH, WIDEN)
            tl.store(at, packed(h, columns), mask=entries < 0)
