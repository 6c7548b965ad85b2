"""row_grad in Triton, and the gather of gradient rows that all row kernels share.

A latent's gradient is a sum over its entries, and entries are spread as unevenly as can be: most
latents have a handful, some have one in every token. So the list of all entries is cut into chunks
at fixed positions. A first kernel sums the chunks that lie within one latent; a row's program then
adds these sums to the entries before its first and after its last whole chunk. No program gathers
more than two chunks, and the order of every sum follows from the positions alone: no atomics, no
table of hot latents, nothing the host must wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.tensors import packed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.primitives.terms import Term

_SHORTEST_CHUNK = 256  # entries
_MOST_CHUNKS = 4096  # bounds the memory of their sums: longer lists have longer chunks
# Of a thread, at most: room for 16 warps. Told nothing, the assembler spills a few values in order
# to stay below some smaller number.
_REGISTERS = 128


class RowTile(NamedTuple):
    """Rows, entries of each and columns that a program takes at a time, and its warps.

    A thread holds 8 columns (a 16-byte load of a bf16 row) of 8 entries: these are the loads in
    flight that hide the latency of a gather. Very wide rows leave registers for fewer entries;
    narrow ones, a vector above all, take several latents to a program.
    """

    latents: int
    entries: int
    columns: int
    warps: int

    def constants(self) -> dict[str, int]:
        """The constants and options of a launch."""
        return {
            "LATENTS": self.latents,
            "ENTRIES": self.entries,
            "COLUMNS": self.columns,
            "num_warps": self.warps,
            "maxnreg": _REGISTERS,
        }


def whole(width: int) -> RowTile:
    """A tile that holds all columns, as normalising a row needs."""
    columns = gpu.next_power_of_two(width)
    warps = min(16, max(1, columns // 256))
    latents = min(32, max(1, 256 // columns))
    held = max(1, latents * columns // (32 * warps))  # columns of a thread
    values = 64 if warps <= 8 else 32  # with 16 warps a thread has 128 registers at most
    return RowTile(latents, min(8, max(1, values // held)), columns, warps)


def blocks(width: int) -> RowTile:
    """A tile of some columns, of the efficient sizes the one that pads a row least."""
    if width <= 256:
        return whole(width)
    return whole(min((1024, 512, 256), key=lambda columns: -width % columns))


def packed_terms(
    terms: Sequence[Term], width: int
) -> tuple[tuple[tuple[Any, ...], ...], dict[str, int]]:
    """Terms as the kernels take them, with the sums of their chunks, and the constants of both."""
    longest = max((term.entries.numel() for term in terms), default=0)
    chunk = max(_SHORTEST_CHUNK, gpu.next_power_of_two(triton.cdiv(longest, _MOST_CHUNKS)))
    constants = {"TERMS": len(terms), "CHUNK": chunk}  # len() in a kernel fails on a None inside
    return tuple(_packed_term(term, width, chunk) for term in terms), constants


def _packed_term(term: Term, width: int, chunk: int) -> tuple[Any, ...]:
    source = packed(term.source)
    if source is not None and source.dtype == torch.float64:
        source = source.float()  # the coefficients are fp32, so are the sums
    coef = term.coef.float().contiguous()
    common = (*(t.contiguous() for t in term[:3]), coef, source)
    chunks, tile = term.entries.numel() // chunk, blocks(width)
    if chunks == 0:
        return (*common, None)
    sums = coef.new_empty((chunks, width))
    _sum_chunks[(chunks, triton.cdiv(width, tile.columns))](
        (*common, None),
        sums,
        term.offsets.numel() - 1,
        width,
        CHUNK=chunk,
        ENTRIES=min(chunk, tile.entries * tile.latents),
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return (*common, sums)


@triton.jit
def pointers(matrix, starts, columns):
    """[LATENTS, COLUMNS]; columns count from each start, so a thread's differ by constants."""
    return (matrix + starts)[:, None] + columns[None, :]


@triton.jit
def weighted_rows(source, rows, coef, wanted, first, columns, inside, width):
    """Sums of ``coef * source[rows]`` over the second axis of [LATENTS, ENTRIES]."""
    at = (source + rows.to(tl.int64) * width + first)[:, :, None] + columns[None, None, :]
    mask = wanted[:, :, None] & inside[None, None, :]
    return tl.sum(coef[:, :, None] * tl.load(at, mask=mask, other=0).to(tl.float32), 1)


@triton.jit
def sum_entries(
    term,
    begin,
    stop,
    resume,
    end,
    first,
    columns,
    inside,
    width,
    ENTRIES: tl.constexpr,
):
    """Per latent the sum of its entries in [begin, stop) and [resume, end)."""
    _, entries, rows, coefs, source, _ = term
    total = tl.zeros((begin.shape[0], columns.shape[0]), tl.float32)
    gap, count = resume - stop, stop - begin + end - resume
    for done in range(0, tl.max(count, 0), ENTRIES):
        nth = done + tl.arange(0, ENTRIES)[None, :]
        wanted = nth < count[:, None]
        at = begin[:, None] + nth
        at += tl.where(at >= stop[:, None], gap[:, None], 0)
        coef = tl.load(coefs + tl.load(entries + at, mask=wanted, other=0), mask=wanted, other=0)
        if source is None:
            total += tl.sum(coef, 1)[:, None]
        else:
            row = tl.load(rows + at, mask=wanted, other=0)
            total += weighted_rows(source, row, coef, wanted, first, columns, inside, width)
    return total


@triton.jit
def _sum_chunks(
    term,
    sums,
    F,
    width,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Most chunks hold the entries of several latents. Nobody asks for their sums, so the program
    # looks up the latent of its first entry and leaves if that does not reach to the last.
    begin = tl.program_id(0) * CHUNK
    offsets = term[0]
    if tl.load(offsets + F) < begin + CHUNK:
        return
    latent, above = 0, F
    while above - latent > 1:
        middle = latent + (above - latent) // 2
        before = tl.load(offsets + middle) <= begin
        latent = tl.where(before, middle, latent)
        above = tl.where(before, above, middle)
    if tl.load(offsets + above) < begin + CHUNK:
        return
    first, columns = tl.program_id(1).to(tl.int64) * COLUMNS, tl.arange(0, COLUMNS)
    inside = columns < width - first
    begin += tl.zeros((1,), tl.int32)
    end = begin + CHUNK
    total = sum_entries(term, begin, end, end, end, first, columns, inside, width, ENTRIES)
    at = sums + tl.program_id(0).to(tl.int64) * width + first
    tl.store(at + columns[None, :], total, mask=inside[None, :])


@triton.jit
def gather(
    terms,
    latents,
    wanted,
    first,
    columns,
    inside,
    width,
    TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """[LATENTS, COLUMNS] of the gradient: first each term's entries, then its whole chunks."""
    grad = tl.zeros((latents.shape[0], columns.shape[0]), tl.float32)
    for t in tl.static_range(TERMS):
        offsets, sums = terms[t][0], terms[t][5]
        begin = tl.load(offsets + latents, mask=wanted, other=0)
        end = tl.load(offsets + latents + 1, mask=wanted, other=0)
        if sums is None:
            grad += sum_entries(
                terms[t], begin, end, end, end, first, columns, inside, width, ENTRIES
            )
        else:
            low, high = (begin + CHUNK - 1) // CHUNK, end // CHUNK
            chunks = tl.maximum(high - low, 0)
            stop = tl.where(chunks > 0, low * CHUNK, end)
            resume = tl.where(chunks > 0, high * CHUNK, end)
            grad += sum_entries(
                terms[t], begin, stop, resume, end, first, columns, inside, width, ENTRIES
            )
            for done in range(0, tl.max(chunks, 0), ENTRIES):
                nth = done + tl.arange(0, ENTRIES)[None, :]
                left = nth < chunks[:, None]
                one = tl.where(left, 1.0, 0.0)
                rows = low[:, None] + nth
                grad += weighted_rows(sums, rows, one, left, first, columns, inside, width)
    return grad


@triton.jit
def _row_grad(
    out,
    terms,
    F,
    width,
    TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    LATENTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    first, columns = tl.program_id(1).to(tl.int64) * COLUMNS, tl.arange(0, COLUMNS)
    wanted, inside = latents < F, columns < width - first
    grad = gather(terms, latents, wanted, first, columns, inside, width, TERMS, CHUNK, ENTRIES)
    at = pointers(out, latents.to(tl.int64) * width + first, columns)
    tl.store(at, grad, mask=wanted[:, None] & inside[None, :])


def run(terms: Sequence[Term], n_latents: int, width: int) -> torch.Tensor:
    """Gathers every row's block of columns."""
    parts, constants = packed_terms(terms, width)
    out, tile = terms[0].coef.new_empty((n_latents, width)), blocks(width)
    grid = (triton.cdiv(n_latents, tile.latents), triton.cdiv(width, tile.columns))
    _row_grad[grid](out, parts, n_latents, width, **constants, **tile.constants())
    return out
