"""Every shipped kernel configuration compiles for sm_80, sm_90 and sm_100 and fits there.

The table is `benchmarks.kernel_table.CASES`; a sample of it is compiled here, all of it with
``-m slow``. What was compiled must also be what docs/kernels-compiled.md says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import calls, kernel_table
from benchmarks.aot import ARCHITECTURES, MATRIX_INSTRUCTION, compiled_for
from benchmarks.gpu_check.gather import gather_sum
from benchmarks.kernel_table import CASES, FORMS, PAGE, CompiledCase, KernelCase
from sae_kernels import gpu
from sae_kernels.primitives.select_threshold import triton as select_threshold
from sae_kernels.primitives.select_topk.screen import score_found
from tests.tiers import covers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

pytestmark = pytest.mark.skipif(
    gpu.interpreted(), reason="compiles kernels: TRITON_INTERPRET must not be set"
)


def of_each_kernel(cases: Iterable[KernelCase]) -> list[list[KernelCase]]:
    """The cases of each primitive and backend."""
    found: dict[tuple[str, str], list[KernelCase]] = {}
    for case in cases:
        found.setdefault((case.primitive, case.backend), []).append(case)
    return list(found.values())


def sample(cases: list[KernelCase]) -> list[KernelCase]:
    """Of one kernel's calls as many as have every K, dtype, size and set of options in them."""
    rows = [tuple(enumerate(map(str, (c.K, c.dtype, c.F, c.B, c.options)))) for c in cases]
    return [cases[i] for i in sorted(covers(rows)[0])]


def on_one(case: KernelCase, i: int) -> KernelCase:
    """The case on the i-th architecture, in turns."""
    return case._replace(architectures=(case.architectures[i % len(case.architectures)],))


# Of every kernel calls at one width, and one of its forms, the next at each.
SAMPLE = [
    on_one(case, i)
    for i, case in enumerate(
        case
        for cases in of_each_kernel(case for case in CASES if case.sampled)
        for case in sample(cases)
    )
]
FORMS_SAMPLE = [on_one(forms[i % len(forms)], i) for i, forms in enumerate(of_each_kernel(FORMS))]
EVERY_CHANGE = (*SAMPLE, *FORMS_SAMPLE)


@functools.cache
def compiled(which: tuple[KernelCase, ...]) -> dict[tuple[KernelCase, int], CompiledCase]:
    """All of them by one start of processes, once a session, on all cores."""
    return {(row.case, row.architecture): row for row in kernel_table.compile_all(which)}


def name(value: KernelCase | int) -> str:
    if isinstance(value, int):
        return f"sm_{value}"
    return f"{value.primitive}-{value.backend}-{value.call}".replace(" ", "-")


def on_every_architecture(cases: Sequence[KernelCase]) -> pytest.MarkDecorator:
    pairs = [(case, architecture) for case in cases for architecture in case.architectures]
    return pytest.mark.parametrize(("case", "architecture"), pairs, ids=name)


@pytest.mark.full
@on_every_architecture(SAMPLE)
def test_passes_the_gates_and_is_on_the_page(case: KernelCase, architecture: int) -> None:
    check(compiled(EVERY_CHANGE)[case, architecture])


@pytest.mark.slow
@on_every_architecture(CASES)
def test_all_of_them_too(case: KernelCase, architecture: int) -> None:
    check(compiled(tuple(CASES))[case, architecture])


@pytest.mark.full
@on_every_architecture(FORMS_SAMPLE)
def test_optional_arguments_given_or_left_out(case: KernelCase, architecture: int) -> None:
    assert compiled(EVERY_CHANGE)[case, architecture].faults() == []


@pytest.mark.slow
@on_every_architecture(FORMS)
def test_every_optional_argument_given_and_left_out(case: KernelCase, architecture: int) -> None:
    assert kernel_table.compile_case(case, architecture).faults() == []


def check(row: CompiledCase) -> None:
    assert row.faults() == []
    page = PAGE.read_text()
    if kernel_table.versions() not in page.partition("##")[0]:
        pytest.skip(f"the page is of another version than {kernel_table.versions()}")
    title = f"{row.case.primitive}, {row.case.backend}"
    lines = kernel_table.sections(page)[title].splitlines()
    assert [line for line in row.lines() if line not in lines] == [], "not on the page: " + REMEDY


REMEDY = "python -m benchmarks.kernel_table"


def test_the_page_has_a_row_for_every_case_and_no_others() -> None:
    page = kernel_table.sections(PAGE.read_text())
    expected = {
        (f"{case.primitive}, {case.backend}", case.call, str(architecture))
        for case in CASES
        for architecture in case.architectures
    }
    found = {
        (title, *(cell.strip() for cell in line.split("|")[1:3]))
        for title, text in page.items()
        for line in text.splitlines()[4:]
    }
    assert found == expected, REMEDY


def test_every_kernel_that_triton_compiles_is_in_the_table() -> None:
    written = {pair for pair in calls.kernels() if pair[1] in ("triton", "gluon")}
    assert {(case.primitive, case.backend) for case in CASES} == written
    assert {(case.primitive, case.backend) for case in SAMPLE} == written


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gather_that_floors_are_measured_with_is_a_good_one(architecture: int) -> None:
    table, indices = torch.empty(64, 768, dtype=torch.bfloat16), torch.zeros(16, 64).int()
    with compiled_for(architecture) as kernels:
        gather_sum(table, indices, torch.empty(16, 768))
    assert (
        CompiledCase(KernelCase("decode", "triton", 768, 64), architecture, tuple(kernels)).faults()
        == []
    )


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "instruction"), [(80, "IMMA"), (90, "IGMMA")])
def test_a_screen_in_int8_that_no_call_takes_yet(architecture: int, instruction: str) -> None:
    x, W = torch.randn(512, 1024).bfloat16(), torch.randn(4096, 1024).bfloat16()
    with compiled_for(architecture) as kernels:
        found = select_threshold.behind_screen(x, W, None, torch.full((4096,), 9.0))
        assert found is not None
        score_found(x, W, None, found)
    assert {kernel.spill_bytes for kernel in kernels} == {0}
    by_name = {kernel.name: kernel for kernel in kernels}
    assert by_name["_find"].has(instruction)
    assert by_name["_score_found"].has(MATRIX_INSTRUCTION[architecture])


@triton.jit
def _sum_of_tiles(x, out, n, N: tl.constexpr):
    at = tl.arange(0, 64)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros((64, N), tl.float32)
    for i in range(n):
        total += tl.load(x + i * 64 * N + at)
    tl.store(out + at, total)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES[:1])
def test_the_gates_can_fail(architecture: int) -> None:
    # Sums of 64 x 256 numbers in one warp are 512 registers a thread: there are 255.
    with compiled_for(architecture) as kernels:
        _sum_of_tiles[(1,)](torch.empty(64, 256), torch.empty(64, 256), 2, N=256, num_warps=1)
    case = KernelCase("decode", "triton", 256, 64, matrix=True)
    faults = CompiledCase(case, architecture, tuple(kernels)).faults()
    assert any("spills" in fault for fault in faults)
    assert any(f"no {kernel_table.MATRIX_INSTRUCTION[architecture]}" in f for f in faults)
    (kernel,) = kernels
    wasteful = dataclasses.replace(
        kernel, warps=32, registers=128, shared_bytes=1 << 20, instructions=Counter({"LDG.E": 1})
    )
    faults = CompiledCase(case, architecture, (wasteful,)).faults()
    for what in ("registers", "bytes of", "16-byte"):
        assert any(what in fault for fault in faults), what
    assert CompiledCase(case, architecture, ()).faults()[0] == "launches no kernel"
