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
    narrow ones, a vector above all, take several latents to a program. ``rest`` columns follow the
    first: tensors have powers of two only, and most widths are nearer to a sum of two.
    """

    latents: int
    entries: int
    columns: int
    warps: int
    rest: int = 0

    def constants(self) -> dict[str, int]:
        """The constants and options of a launch."""
        return {
            "LATENTS": self.latents,
            "ENTRIES": self.entries,
            "COLUMNS": self.columns,
            "REST": self.rest,
            "num_warps": self.warps,
            "maxnreg": _REGISTERS,
        }


def whole(width: int) -> RowTile:
    """A tile that holds all columns, as normalising a row needs."""
    columns, rest = gpu.next_power_of_two(width), 0
    left = width - columns // 2
    if columns > 512 and gpu.next_power_of_two(left) <= columns // 4:
        columns //= 2
        rest = max(columns // 4, gpu.next_power_of_two(left))  # two of a thread, see `rest_of`
    warps = min(16, max(1, columns // 256))
    latents = min(32, max(1, 256 // columns))
    held = max(1, latents * columns // (32 * warps))  # columns of a thread
    values = 64 if warps <= 8 and not rest else 32  # of 128 registers
    return RowTile(latents, min(8, max(1, values // held)), columns, warps, rest)


def blocks(width: int) -> RowTile:
    """A tile of some columns, of the efficient sizes the one that pads a row least."""
    if width <= 256:
        return whole(width)
    return whole(min((1024, 512, 256), key=lambda columns: -width % columns))


def beside_products(width: int) -> RowTile:
    """A tile of some columns for rows that are multiplied with a matrix too.

    A product is added up across the threads of each block of columns: fewer blocks of more columns
    in a thread take fewer instructions, as long as they leave few of them idle.
    """
    if width <= 256:
        return whole(width)
    columns = 512 if -width % 512 <= width // 8 else 256
    return RowTile(1, 2048 // columns, columns, 1)


def packed_terms(
    terms: Sequence[Term],
    width: int,
    tile: RowTile | None = None,
    against: tuple[Any, ...] | None = None,
) -> tuple[tuple[tuple[Any, ...], ...], dict[str, int]]:
    """Terms as the kernels take them, with the sums of their chunks, and the constants of both."""
    longest = max((term.entries.numel() for term in terms), default=0)
    chunk = max(_SHORTEST_CHUNK, gpu.next_power_of_two(-(-longest // _MOST_CHUNKS)))
    constants = {"TERMS": len(terms), "CHUNK": chunk}  # len() in a kernel fails on a None inside
    tile = tile or blocks(width)
    return tuple(_packed_term(term, width, chunk, tile, against) for term in terms), constants


def _packed_term(
    term: Term, width: int, chunk: int, tile: RowTile, against: tuple[Any, ...] | None
) -> tuple[Any, ...]:
    source = packed(term.source)
    if source is not None and source.dtype == torch.float64:
        source = source.float()  # the coefficients are fp32, so are the sums
    coef = term.coef.float().contiguous()
    common = (*(t.contiguous() for t in term[:3]), coef, source)
    chunks = term.entries.numel() // chunk
    if chunks == 0:
        return (*common, None)
    sums = coef.new_empty((chunks, width))
    _sum_chunks[(chunks, -(-width // tile.columns))](
        (*common, None),
        sums,
        against,
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
def block_of(first, part, width, COLUMNS: tl.constexpr):
    """Columns from ``first`` on, counted from it, and which of them a program has."""
    columns = tl.arange(0, COLUMNS)
    return columns, (columns < part) & (columns < width - first)


@triton.jit
def rest_of(first, part, width, COLUMNS: tl.constexpr, REST: tl.constexpr):
    """The block of columns after the first ones."""
    # A narrow block would have its entries spread over threads in order to load 16 bytes in each,
    # and be added up across them. So a thread is told that it has no more neighbours than these.
    columns = tl.max_contiguous(COLUMNS + tl.arange(0, REST), REST * 8 // COLUMNS)
    return columns, (columns < part) & (columns < width - first)


@triton.jit
def _gathered(source, rows, wanted, first, block, width):
    """A block of columns of some rows, fp32 [LATENTS, ENTRIES, COLUMNS]."""
    columns, inside = block
    at = (source + rows.to(tl.int64) * width + first)[:, :, None] + columns[None, None, :]
    return tl.load(at, mask=wanted[:, :, None] & inside[None, None, :], other=0).to(tl.float32)


@triton.jit
def _sum_entries(
    term,
    begin,
    stop,
    resume,
    end,
    first,
    blocks,
    width,
    ENTRIES: tl.constexpr,
    products=None,
):
    """Per latent the sum of its entries in [begin, stop) and [resume, end), in each block.

    ``products`` are what every row of the source is multiplied with as well, and where its
    products with the first block go.
    """
    _, entries, rows, coefs, source, _ = term
    block, rest = blocks
    L: tl.constexpr = begin.shape[0]
    total = tl.zeros((L, block[0].shape[0]), tl.float32)
    more = total  # None cannot be returned
    if rest is not None:
        more = tl.zeros((L, rest[0].shape[0]), tl.float32)
    gap, count = resume - stop, stop - begin + end - resume
    for done in range(0, tl.max(count, 0), ENTRIES):
        nth = done + tl.arange(0, ENTRIES)[None, :]
        wanted = nth < count[:, None]
        at = begin[:, None] + nth
        at += tl.where(at >= stop[:, None], gap[:, None], 0)
        coef = tl.load(coefs + tl.load(entries + at, mask=wanted, other=0), mask=wanted, other=0)
        if source is None:
            total += tl.sum(coef, 1)[:, None]
            if rest is not None:
                more += tl.sum(coef, 1)[:, None]
        else:
            row = tl.load(rows + at, mask=wanted, other=0)
            x = _gathered(source, row, wanted, first, block, width)
            if products is not None:
                w, dots = products
                tl.store(dots + at, tl.sum(x * w[:, None, :], 2), mask=wanted)
                x = tl.where(coef[:, :, None] != 0, x, 0)  # adds nothing, whatever it holds
            total += tl.sum(coef[:, :, None] * x, 1)
            if rest is not None:
                x = _gathered(source, row, wanted, first, rest, width)
                more += tl.sum(coef[:, :, None] * x, 1)
    return total, more


@triton.jit
def _products_of(against, latents, wanted, first, block, width):
    """The latents' own rows, and where this program's part of the products goes."""
    W, dots, n = against
    at = pointers(W, latents.to(tl.int64) * width + first, block[0])
    w = tl.load(at, mask=wanted[:, None] & block[1][None, :], other=0).to(tl.float32)
    return w, dots + tl.program_id(1).to(tl.int64) * n


@triton.jit
def _sum_chunks(
    term,
    sums,
    against,
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
    first = tl.program_id(1).to(tl.int64) * COLUMNS
    block = block_of(first, COLUMNS, width, COLUMNS)
    latents, begin = latent + tl.zeros((1,), tl.int32), begin + tl.zeros((1,), tl.int32)
    end = begin + CHUNK
    products = None
    if against is not None:
        products = _products_of(against, latents, latents >= 0, first, block, width)
    total, _ = _sum_entries(
        term, begin, end, end, end, first, (block, None), width, ENTRIES, products
    )
    at = sums + tl.program_id(0).to(tl.int64) * width + first
    tl.store(at + block[0][None, :], total, mask=block[1][None, :])


@triton.jit
def gather(
    terms,
    latents,
    wanted,
    first,
    blocks,
    width,
    TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
    products=None,
):
    """Blocks of columns of the gradient: first each term's entries, then its whole chunks.

    [LATENTS, COLUMNS] each; where the second block is None, what comes second means nothing.
    """
    block, rest = blocks
    L: tl.constexpr = latents.shape[0]
    grad = tl.zeros((L, block[0].shape[0]), tl.float32)
    more = grad
    if rest is not None:
        more = tl.zeros((L, rest[0].shape[0]), tl.float32)
    for t in tl.static_range(TERMS):
        offsets, sums = terms[t][0], terms[t][5]
        begin = tl.load(offsets + latents, mask=wanted, other=0)
        end = tl.load(offsets + latents + 1, mask=wanted, other=0)
        stop, resume, low, chunks = end, end, end, end - end
        if sums is not None:
            low, high = (begin + CHUNK - 1) // CHUNK, end // CHUNK
            chunks = tl.maximum(high - low, 0)
            stop = tl.where(chunks > 0, low * CHUNK, end)
            resume = tl.where(chunks > 0, high * CHUNK, end)
        added, beside = _sum_entries(
            terms[t], begin, stop, resume, end, first, blocks, width, ENTRIES, products
        )
        grad += added
        if rest is not None:
            more += beside
        if sums is not None:
            for done in range(0, tl.max(chunks, 0), ENTRIES):
                nth = done + tl.arange(0, ENTRIES)[None, :]
                left, rows = nth < chunks[:, None], low[:, None] + nth
                grad += tl.sum(_gathered(sums, rows, left, first, block, width), 1)
                if rest is not None:
                    more += tl.sum(_gathered(sums, rows, left, first, rest, width), 1)
    return grad, more


@triton.jit
def _row_grad(
    out,
    terms,
    against,
    F,
    width,
    TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    LATENTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    REST: tl.constexpr,
):
    latents = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    first, wanted = tl.program_id(1).to(tl.int64) * COLUMNS, latents < F
    block = block_of(first, COLUMNS, width, COLUMNS)
    products = None
    if against is not None:
        products = _products_of(against, latents, wanted, first, block, width)
    grad, _ = gather(
        terms, latents, wanted, first, (block, None), width, TERMS, CHUNK, ENTRIES, products
    )
    at = pointers(out, latents.to(tl.int64) * width + first, block[0])
    tl.store(at, grad.to(out.dtype.element_ty), mask=wanted[:, None] & block[1][None, :])


@triton.jit
def _add_products(dots, parts, offsets, entries, F, n, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up each entry's products with the blocks of columns, in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    listed = (at >= tl.load(offsets)) & (at < tl.load(offsets + F))
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(PARTS):
        total += tl.load(parts + at, mask=listed, other=0)
        parts += n
    tl.store(dots + tl.load(entries + at, mask=listed, other=0), total, mask=listed)


def run(
    terms: Sequence[Term],
    n_latents: int,
    width: int,
    dtype: torch.dtype | None = None,
    W: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers every row's block of columns."""
    offsets, entries, *_ = terms[0]
    tile = blocks(width) if W is None else beside_products(width)
    n, parts = entries.numel(), -(-width // tile.columns)
    against, products = None, terms[0].coef.new_zeros(0 if W is None else terms[0].coef.shape[0])
    if W is not None:
        against = (W.contiguous(), W.new_empty((parts, n), dtype=torch.float32), n)
    packed, constants = packed_terms(terms, width, tile, against)
    stored = torch.float32 if gpu.interpreted() else dtype or torch.float32  # it would cut bf16
    out = terms[0].coef.new_empty((n_latents, width), dtype=stored)
    grid = (-(-n_latents // tile.latents), parts)
    _row_grad[grid](out, packed, against, n_latents, width, **constants, **tile.constants())
    if against is not None and n:
        _add_products[(-(-n // 256),)](
            products, against[1], offsets.contiguous(), entries.contiguous(), n_latents, n,
            PARTS=parts, BLOCK=256,
        )  # fmt: skip
    return out.to(dtype or stored), products
