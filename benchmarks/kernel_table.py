"""Table of every kernel as compiled for each GPU: ``python -m benchmarks.kernel_table``.

`CASES` is the one table: the tests compile a sample of it and hold it to the gates, and this
command compiles all of it and writes docs/kernels-compiled.md. No GPU takes part: Triton and its
assembler name registers, spills and shared memory without one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
import triton

from benchmarks import calls
from benchmarks.aot import ARCHITECTURES, MATRIX_INSTRUCTION, SHARED_LIMIT, Compiled, compiled_for
from benchmarks.study import DOCS
from sae_kernels.bench.cases import Shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE = DOCS / "kernels-compiled.md"
WIDTHS = (768, 1152, 2304, 2688, 3584, 4096, 4608, 5120)
SAMPLED_WIDTHS = (768, 2304, 4096)
_REGISTERS = 65536  # of a multiprocessor: a block that wants more is never launched
_WIDE_LOAD = re.compile(r"LDG\.\S*128|LDGSTS\.\S*128|UTMALDG|UBLKCP")

HEAD = """# Kernels as compiled

Written by `python -m benchmarks.kernel_table`; do not edit. Every launch of a call of the named
primitive, compiled ahead of time on a machine without a GPU by {versions}. A row is one kernel on
one architecture: the launch, the tile, registers per thread, bytes spilled per thread and bytes of
shared memory per block. It says that a kernel fits the architecture, not that it is fast.
`tests/benchmarks/test_aot.py` compiles a sample again and holds every row to the gates: no spills,
registers and shared memory within the architecture, its matrix instruction in products, 16-byte
loads in gathers and streams.
"""
COLUMNS = """| call | sm | kernel | warps | stages | tile | registers | spilled | shared |
|---|---:|---|---:|---:|---|---:|---:|---:|"""


class KernelCase(NamedTuple):
    """One call to compile.

    Attributes:
        primitive, backend: what is called.
        D, K: as in the call; tokens and latents only have to be there.
        options: of the primitive's builder in `benchmarks.calls`.
        dtype: of the operands.
        matrix: whether a matrix instruction must occur.
        wide: whether a 16-byte load must occur.
        architectures: where the backend runs.
        F, B: latents and tokens, where a launcher looks at their number.
    """

    primitive: str
    backend: str
    D: int
    K: int
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.bfloat16
    matrix: bool = False
    wide: bool = True
    architectures: tuple[int, ...] = ARCHITECTURES
    F: int = 4096
    B: int = 64

    @property
    def call(self) -> str:
        """The case in words, unique among those of its primitive and backend."""
        words = [f"D={self.D}", f"K={self.K}", _short(self.dtype)]
        return " ".join(words + [f"{name}={_short(value)}" for name, value in self.options])

    @property
    def sampled(self) -> bool:
        """Whether every change compiles it again, or only the slow tests do."""
        return self.D in SAMPLED_WIDTHS[:1]


def _short(value: object) -> str:
    return str(value).removeprefix("torch.").removeprefix("triton.language.")


def _widths(
    primitive: str, backend: str, *, K: int = 32, widths: Iterable[int] = WIDTHS, **settings: Any
) -> Iterator[KernelCase]:
    for D in widths:
        yield KernelCase(primitive, backend, D, K, **settings)


def _routed(primitive: str) -> Iterator[KernelCase]:
    for dtype in (torch.bfloat16, torch.float32):
        for E in (8, 32):
            options, matrix = (("experts", E),), dtype != torch.float32
            yield KernelCase(primitive, "triton", 768, 32, options, dtype, matrix, F=65536)


_FP32 = torch.float32
_VECTOR = (("width", 1), ("norm", "none"), ("copied", False))  # b_enc
_PENALTY = (("norm", "none"), ("penalties", 4))  # of a crosscoder
_SPLIT = (("split", True),)
_GROUPS, _RAGGED = (("groups", 4),), (("ragged", True),)
_LEAN = (("split", True), ("states", torch.bfloat16))
CASES: tuple[KernelCase, ...] = (
    # As many latents as AuxK takes by default.
    *_widths("auxk", "triton", widths=(768, 2304), matrix=True, F=8192),
    *_widths("code_grad", "triton"),
    *_widths("code_grad", "triton", K=128, widths=SAMPLED_WIDTHS),
    *_widths("code_grad", "triton", options=_GROUPS, widths=(768,)),
    *_widths("code_grad", "triton", options=_RAGGED, widths=(768,)),
    *_widths("decode", "triton"),
    *_widths("decode", "triton", K=128, widths=SAMPLED_WIDTHS),
    *_widths("decode", "triton", dtype=_FP32, widths=(768,)),
    *_widths("decode", "triton", options=_GROUPS, widths=(768,)),
    *_widths("decode", "triton", options=_RAGGED, widths=(768,)),
    *_widths("decode_residual", "triton"),
    *_widths("decode_residual", "triton", K=64, widths=SAMPLED_WIDTHS),
    *_widths("decode_residual", "triton", K=128, widths=SAMPLED_WIDTHS),
    *_widths("decode_residual", "triton", dtype=_FP32, widths=(768,)),
    *_widths("decode_residual", "triton", options=_GROUPS, widths=(768,)),
    *_widths("decode_residual", "triton", options=_RAGGED, widths=(768,)),
    *_widths("decode_residual", "triton", options=_GROUPS + _RAGGED, widths=(2304,)),
    *_widths("pick_dead", "triton", widths=(768,)),
    *_routed("route_top1"),
    *_widths("row_grad", "triton"),
    *_widths("row_grad", "triton", dtype=_FP32, widths=(768,)),
    *_widths("row_grad", "triton", options=(("width", 1),), widths=(768,), wide=False),
    *_widths("row_sqnorm", "triton"),
    *_widths("row_sqnorm", "triton", options=_SPLIT, widths=(2688,)),
    *_widths("row_update", "triton"),
    *_widths("row_update", "triton", options=_SPLIT, widths=(768, 2688, 4096)),
    *_widths("row_update", "triton", options=_LEAN, widths=(768, 2688, 4096)),
    *_widths("row_update", "triton", dtype=_FP32, options=(("copied", False),), widths=(768,)),
    *_widths("row_update", "triton", options=_VECTOR, widths=(768,), wide=False),
    *_widths("row_update", "triton", options=_PENALTY, widths=(4096,)),
    # D is no constant of these kernels: other widths are the same programs.
    *_widths("select_batch_topk", "triton", widths=(768,), matrix=True),
    *_widths("select_threshold", "triton", widths=(768,), matrix=True),
    *_widths("select_threshold", "triton", dtype=_FP32, widths=(768,)),
    *_widths("select_topk", "gluon", widths=(768,), matrix=True, architectures=(90,)),
    *_widths("select_topk", "gluon", K=64, widths=(2304,), matrix=True, architectures=(90,)),
    *_widths("select_topk", "triton", widths=(768,), matrix=True),
    *_widths("select_topk", "triton", K=64, widths=(2304,), matrix=True),
    *_widths("select_topk", "triton", K=128, widths=(1024,), matrix=True),
    *_widths("select_topk", "triton", options=(("ranked", True),), widths=(1024,), matrix=True),
    *_widths("select_topk", "triton", dtype=_FP32, widths=(1024,)),
    # How many latents an expert has decides the length of the lists.
    *_routed("select_topk_routed"),
    *_widths("transpose_codes", "triton", widths=(768,), wide=False),
)


class CompiledCase(NamedTuple):
    """A case on one architecture: what its call launched, and the error that ended it early."""

    case: KernelCase
    architecture: int
    kernels: tuple[Compiled, ...]
    error: str = ""

    def faults(self) -> list[str]:
        """Broken gates in words."""
        limit = SHARED_LIMIT[self.architecture]
        found = [] if self.kernels else ["launches no kernel"]
        if self.error:
            found.append(f"ends with {self.error}")
        for kernel in self.kernels:
            wanted = 32 * kernel.warps * kernel.registers
            if kernel.spill_bytes:
                found.append(f"{kernel.name} spills {kernel.spill_bytes} bytes per thread")
            if wanted > _REGISTERS:
                found.append(f"{kernel.name} wants {wanted} registers, there are {_REGISTERS}")
            if kernel.shared_bytes > limit:
                found.append(f"{kernel.name} wants {kernel.shared_bytes} bytes of {limit} shared")
        matrix = MATRIX_INSTRUCTION[self.architecture]
        if self.case.matrix and not any(kernel.has(matrix) for kernel in self.kernels):
            found.append(f"no {matrix} in any kernel")
        names = [name for kernel in self.kernels for name in kernel.instructions]
        if self.case.wide and not any(map(_WIDE_LOAD.match, names)):
            found.append("no 16-byte load in any kernel")
        return found

    def lines(self) -> list[str]:
        """The rows of the page."""
        return [
            f"| {self.case.call} | {self.architecture} | {kernel.name.strip('_')} "
            f"| {kernel.warps} | {kernel.stages} | {_tile(kernel)} | {kernel.registers} "
            f"| {kernel.spill_bytes} | {kernel.shared_bytes} |"
            for kernel in self.kernels
        ]


def _tile(kernel: Compiled) -> str:
    tile = {n: v for n, v in kernel.constants.items() if n not in ("D", "K", "WIDTH")}
    return " ".join(f"{n}={_short(v)}" for n, v in tile.items()) or "-"


def versions() -> str:
    """The version that the figures depend on."""
    return f"Triton {triton.__version__}"


def compile_case(case: KernelCase, architecture: int) -> CompiledCase:
    """Calls the implementation as a user would, on small tensors of the real widths."""
    torch.set_num_threads(1)
    shape = Shape(case.B, case.D, case.F, case.K)
    inputs = calls.arguments(case.primitive, shape, case.dtype, **dict(case.options))
    module = calls.implementation(case.primitive, case.backend)
    error = ""
    with torch.no_grad(), compiled_for(architecture) as kernels:
        try:
            module.run(*inputs)
        except Exception as raised:  # one case must not hide what became of the others
            error = f"{type(raised).__name__}: {raised}"
    return CompiledCase(case, architecture, tuple(kernels), error)


def compile_all(cases: Iterable[KernelCase], workers: int | None = None) -> list[CompiledCase]:
    """Every case on each of its architectures, in processes of their own and a fresh cache."""
    jobs = [(case, architecture) for case in cases for architecture in case.architectures]
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),  # the processes inherit it
        ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool,
    ):
        return list(pool.map(compile_case, *zip(*jobs, strict=True)))


def sections(page: str) -> dict[str, str]:
    """The page's sections by their titles."""
    parts = re.split(r"(?m)^(?=## )", page)[1:]
    return {part.splitlines()[0].removeprefix("## "): part.strip() for part in parts}


def main() -> None:
    """Writes the page; with --only just the sections of some primitives."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = sorted({case.primitive for case in CASES})
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    chosen = parser.parse_args().only
    head = HEAD.format(versions=versions())
    old = PAGE.read_text() if PAGE.exists() else ""
    kept = sections(old) if old.startswith(head) else {}
    new: dict[str, list[str]] = {}
    for row in compile_all(case for case in CASES if case.primitive in chosen or not kept):
        title = f"{row.case.primitive}, {row.case.backend}"
        new.setdefault(title, [f"## {title}", "", COLUMNS]).extend(row.lines())
        for fault in row.faults():
            print(f"{title} {row.case.call} sm_{row.architecture}: {fault}")
    whole = kept | {title: "\n".join(lines) for title, lines in new.items()}
    known = sorted({f"{case.primitive}, {case.backend}" for case in CASES} & whole.keys())
    PAGE.write_text("\n\n".join([head.strip(), *(whole[title] for title in known)]) + "\n")


if __name__ == "__main__":
    main()
