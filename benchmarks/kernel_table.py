"""Table of every kernel as compiled for each GPU: ``python -m benchmarks.kernel_table``.

`CASES` is the one table: the tests compile a sample of it and hold it to the gates, and this
command compiles all of it and writes docs/kernels-compiled.md. No GPU takes part: Triton and its
assembler name registers, spills and shared memory without one.
"""

from __future__ import annotations

import argparse
import itertools
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
from sae_kernels.bench.processes import die_with

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
    """One call to compile."""

    primitive: str
    backend: str
    D: int
    K: int
    options: tuple[tuple[str, Any], ...] = ()  # of the primitive's arguments in `benchmarks.calls`
    dtype: torch.dtype = torch.bfloat16  # of the operands
    matrix: bool = False  # whether a matrix instruction must occur
    wide: bool = True  # whether a 16-byte load must occur
    architectures: tuple[int, ...] = ARCHITECTURES  # where the backend runs
    F: int = 4096  # latents and tokens only have to be there, but where a launcher looks
    B: int = 64

    @property
    def call(self) -> str:
        """The case in words, unique among those of its primitive and backend."""
        words = [f"D={self.D}", f"K={self.K}", _short(self.dtype)]
        if self._field_defaults["F"] != self.F:
            words.append(f"F={self.F}")
        if self._field_defaults["B"] > self.B:  # few
            words.append(f"B={self.B}")
        return " ".join(words + [f"{name}={_short(value)}" for name, value in self.options])

    @property
    def sampled(self) -> bool:
        """Whether every change compiles it again, or only the slow tests do."""
        return self.D in SAMPLED_WIDTHS[:1]


def _short(value: object) -> str:
    return str(value).removeprefix("torch.").removeprefix("triton.language.")


Variant = list[dict[str, Any]]


def _at(
    *widths: int, K: int = 32, dtype: torch.dtype = torch.bfloat16, F: int = 4096, **options: Any
) -> Variant:
    """A call at some widths."""
    settings = {"K": K, "dtype": dtype, "F": F, "options": tuple(options.items())}
    return [{"D": D, **settings} for D in widths]


def _cases(
    primitive: str, *variants: Variant, backend: str = "triton", **common: Any
) -> Iterator[KernelCase]:
    for each in itertools.chain(*variants):
        yield KernelCase(primitive, backend, **common, **each)


def _routed(primitive: str) -> Iterator[KernelCase]:
    selects = primitive == "select_topk_routed"  # fp32 behind a screen in bf16, for so many tokens
    for dtype in (torch.bfloat16, torch.float32):
        variants = (_at(768, dtype=dtype, F=65536, experts=E) for E in (8, 32))
        matrix = selects or dtype != torch.float32
        yield from _cases(primitive, *variants, matrix=matrix, B=2048 if selects else 64)


_ALL, _K64, _K128 = _at(*WIDTHS), _at(*SAMPLED_WIDTHS, K=64), _at(*SAMPLED_WIDTHS, K=128)
_ONE, _FP32 = _at(768), _at(768, dtype=torch.float32)
_FORMS = _at(768, groups=4) + _at(768, ragged=True)
_TOPK = _ONE + _at(2304, K=64)
_SPLIT: dict[str, Any] = {"split": True}
_LEAN: dict[str, Any] = {"split": True, "states": torch.bfloat16}
CASES: tuple[KernelCase, ...] = (
    # As many latents as AuxK takes by default.
    *_cases("auxk", _at(768, 2304, F=8192), matrix=True),
    *_cases("code_grad", _ALL, _K128, _FORMS),
    *_cases("decode", _ALL, _K128, _FP32, _FORMS),
    *_cases("decode_residual", _ALL, _K64, _K128, _FP32, _FORMS),
    *_cases("decode_residual", _at(2304, groups=4, ragged=True)),
    *_cases("pick_dead", _ONE, _at(768, F=1 << 20), _at(768, F=1 << 24)),
    *_routed("route_top1"),
    *_cases("row_grad", _ALL, _FP32),
    *_cases("row_grad", _at(768, 2304, dots=True), _at(768, dtype=torch.float32, dots=True)),
    *_cases("row_grad", _at(768, width=1), wide=False),
    *_cases("row_sqnorm", _ALL, _at(2688, **_SPLIT)),
    *_cases("row_update", _ALL, *(_at(768, 2304, 4096, **each) for each in (_SPLIT, _LEAN))),
    *_cases("row_update", _at(768, dtype=torch.float32, copied=False)),
    *_cases("row_update", _at(768, width=1, norm="none", copied=False), wide=False),  # b_enc
    *_cases("row_update", _at(4096, norm="none", penalties=4)),  # of a crosscoder
    # D is no constant of these kernels: other widths are the same programs.
    *_cases("select_batch_topk", _ONE, matrix=True),
    *_cases("select_threshold", _ONE, matrix=True),
    *_cases("select_threshold", _FP32),
    *_cases("select_threshold", _at(1024, dtype=torch.float32), matrix=True, B=512),  # screened
    *_cases("select_threshold", _at(1024), matrix=True, B=16),
    *_cases("select_topk", _TOPK, backend="gluon", matrix=True, architectures=(90,)),
    *_cases("select_topk", _TOPK, _at(1024, K=128), matrix=True),
    *_cases("select_topk", _at(1024, ranked=True), matrix=True),
    # Few tokens: how many latents there are and are kept decides of what the second kernel holds.
    *_cases("select_topk", _ONE, _at(1024, F=65536), _at(1024, ranked=True), matrix=True, B=1),
    *_cases("select_topk", _at(1024, K=64, F=131072), _at(64, F=1 << 20), matrix=True, B=8),
    *(case for B in (1, 4) for case in _cases("select_topk", _at(1024, dtype=torch.float32), B=B)),
    *_cases("select_topk", _FP32, B=16),
    # As many tokens as the screen in bf16 takes; what it leaves over the fp32 product scores.
    *_cases("select_topk", _at(1024, dtype=torch.float32), matrix=True, B=512),
    *_cases("select_topk", _at(1024, dtype=torch.float32, ranked=True), matrix=True, B=512),
    # How many latents an expert has decides the length of the lists.
    *_routed("select_topk_routed"),
    *_cases("select_topk_routed", _at(1024), matrix=True, B=16),
    *_cases("transpose_codes", _ONE, wide=False),
)


# Each optional argument given and left out, as the schemas have them. They need to compile without
# spills and are not on the page.
FORMS: tuple[KernelCase, ...] = tuple(
    KernelCase(
        primitive,
        backend,
        768,
        32,
        tuple(options.items()),
        wide=False,
        architectures=(90,) if backend == "gluon" else ARCHITECTURES,
    )
    for primitive, backend in calls.kernels()
    if backend != "cuda"
    for options in calls.forms(primitive)
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
    # Zeros, for a size that no kernel has counted is waited for.
    empty = mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    with torch.no_grad(), empty, compiled_for(architecture) as kernels:
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
        ProcessPoolExecutor(
            workers or os.cpu_count(), context, initializer=die_with, initargs=(os.getpid(),)
        ) as pool,
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
