"""Backend cpu: calls the C++ kernels of ``sae_kernels._C``."""

from __future__ import annotations

import ctypes
import enum
import functools
import mmap
import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.primitives.terms import Term

ISA_VARIABLE = "SAE_KERNELS_CPU_ISA"
_DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int16: 4,  # the low halves of split master weights
}
_HUGE_PAGE = 2 << 20  # bytes
# By which the kernels know a dtype; several a call, so no function of Python's.
code = _DTYPE_CODES.__getitem__


@functools.cache
def module() -> Any:
    """The compiled module ``sae_kernels._C``.

    Raises:
        RuntimeError: it was not built; the message names the remedy.
    """
    try:
        # After torch, so that both share torch's OpenMP runtime and thread pool.
        from sae_kernels import _C
    except ImportError as error:
        raise RuntimeError(
            f"the compiled module sae_kernels._C cannot be loaded ({error}); build it with a "
            "C++17 compiler by `pip install .` from the source tree"
        ) from error
    return _C


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the host kernels cannot run a call, or None."""
    if device.type != "cpu":
        return f"tensors are on {device}, its kernels run on the CPU"
    # Integers: primitives of indices alone.
    if dtype not in _DTYPE_CODES and dtype not in (torch.int32, torch.int64):
        return f"no kernel for {dtype}, only for float32, float64, bfloat16 and float16"
    try:
        module()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """The ISA variants that are built and that this machine can run, fastest first."""
    return tuple(name for name, supported in module().isas() if supported)


def isa() -> str:
    """The ISA variant in use: the fastest, or the one that ``SAE_KERNELS_CPU_ISA`` forces.

    Raises:
        ValueError: the variable names a variant that this machine cannot run.
    """
    forced = os.environ.get(ISA_VARIABLE)
    if not forced:
        return supported_isas()[0]
    if forced not in supported_isas():
        raise ValueError(
            f"{ISA_VARIABLE}: expected one of {', '.join(supported_isas())} on this machine, "
            f"got {forced!r}"
        )
    return forced


def threads() -> int:
    """The number of threads of a kernel: torch's ``get_num_threads``."""
    return torch.get_num_threads()


class Screening(enum.IntEnum):
    """How encoders multiply bytes to find out which fp32 scores to compute (docs/numerics.md)."""

    NONE = 0
    PLAIN = 1
    PAIRS = 2
    FOURS = 3
    TILES = 4


_INSTRUCTIONS = {
    Screening.PAIRS: "vpmaddubsw",
    Screening.FOURS: "vpdpbusd (VNNI)",
    Screening.TILES: "tdpbusd (AMX)",
}
# From here on a screen pays: measured on a Zen 5, docs/numerics.md.
SCREENED_TOKENS, SCREENED_WIDTH, SCREENED_LATENTS = 128, 256, 8192
FEW_TOKENS = 16  # FewTiles::kMost of csrc/include/sae_kernels/few_tokens.h


def screens(n_tokens: int, d_in: int, n_latents: int, dtype: torch.dtype) -> Screening:
    """How encoders screen the scores of such tokens, if they do.

    The result is the same, bit for bit; in fp32 and on a machine that multiplies bytes faster than
    fp32 numbers it takes less time, unless nearly everything is selected.
    """
    if n_tokens < SCREENED_TOKENS or d_in < SCREENED_WIDTH or n_latents < SCREENED_LATENTS:
        return Screening.NONE
    return fastest_screening(isa()) if dtype == torch.float32 else Screening.NONE


def encoder_note(dtype: torch.dtype, screened_where: str = "") -> str | None:
    """The sentences that `explain` adds about encoders of this dtype.

    Args:
        dtype: of the operands.
        screened_where: what else must hold for a screen.
    """
    notes: list[str] = []
    # fp64, and bf16 on AMX, have blocks of tokens alone.
    if dtype != torch.float64 and not (dtype == torch.bfloat16 and isa().startswith("amx")):
        notes.append(f"up to {FEW_TOKENS} tokens: threads share the latents and read W once")
    how = screens(SCREENED_TOKENS, SCREENED_WIDTH, SCREENED_LATENTS, dtype)
    if how != Screening.NONE:
        notes.append(
            f"screens scores in 8 bits by {_INSTRUCTIONS[how]}, with the same results, from "
            f"{SCREENED_TOKENS} tokens, d_in {SCREENED_WIDTH} and {SCREENED_LATENTS} latents on"
            f"{screened_where}"
        )
    return "; ".join(notes) or None


@functools.cache
def fastest_screening(variant: str) -> Screening:
    """The fastest instruction for products of bytes that an ISA variant has on this machine."""
    return max((how for how in screenings(variant) if how in _INSTRUCTIONS), default=Screening.NONE)


def screenings(variant: str) -> list[Screening]:
    """All ways of screening that an ISA variant can take on this machine, slow ones too."""
    return [how for how in Screening if module().can_screen(variant, how, 1)]


def run(kernel: str, *arguments: Any) -> Any:
    """Runs a kernel on the variant and the threads in use.

    Args:
        kernel: its name in csrc/include/sae_kernels/kernels.h.
        arguments: the fields of its struct in types.h but the last (threads): contiguous tensors
            or None, numbers, and the `code` of dtypes.
    """
    return getattr(module(), kernel)(isa(), *arguments, threads())


def run_with_workspace(kernel: str, *arguments: Any) -> Any:
    """Allocates a kernel's workspace and runs it; arguments as of :func:`run`."""
    kernels, variant, n_threads = module(), isa(), threads()
    needs = getattr(kernels, f"{kernel}_workspace")
    workspace = torch.empty(needs(variant, *arguments, None, n_threads), dtype=torch.uint8)
    return getattr(kernels, kernel)(variant, *arguments, workspace, n_threads)


def in_huge_pages(matrix: torch.Tensor) -> torch.Tensor:
    """A copy in memory of 2 MiB pages, as far as the system gives them to who asks.

    Of those of 4 KiB, 18 thousand hold the encoder that one token is multiplied with. What is
    small, not on the CPU or not on Linux is returned as it is.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or matrix.device.type != "cpu" or matrix.nbytes < 2 * _HUGE_PAGE:
        return matrix
    copy = torch.empty_like(matrix)
    start = -(-copy.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = copy.data_ptr() + matrix.nbytes - start
    # Before anything is written: pages are of the size that is wanted when they come. A refusal
    # leaves them as they are.
    madvise = ctypes.CDLL(None).madvise
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(size // _HUGE_PAGE * _HUGE_PAGE), advice)
    return copy.copy_(matrix)


def packed_terms(terms: Sequence[Term], dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Converts terms to the tuples that kernels take, for sums in ``dtype``."""
    tuples = []
    for term in terms:
        coef = term.coef.to(dtype).contiguous()
        source = None if term.source is None else term.source.contiguous()
        if source is not None and torch.float64 in (dtype, source.dtype):
            source = source.to(dtype)  # the kernels read fp64 rows for fp64 sums and only then
        order = [t.contiguous() for t in (term.offsets, term.entries, term.rows)]
        tuples.append((*order, coef, source, code(dtype if source is None else source.dtype)))
    return tuples
