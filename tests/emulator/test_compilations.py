"""How often kernels are compiled while training changes the arguments of their calls."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import calls
from emulator import triton_driver
from sae_kernels.bench.cases import Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.full


def compiled(primitive: str, ks: Sequence[int]) -> int:
    """Kernels that calls with these numbers of latents per token compile."""
    names: list[str] = []

    def note(name: str, ptx: str) -> str:
        names.append(name)
        return ptx

    with triton_driver.emulated(80, note):
        for k in ks:
            arguments = calls.arguments(primitive, Shape(2, 64, 256, k), torch.float32)
            calls.implementation(primitive, "triton").run(*arguments)
    return len(names)


@pytest.mark.parametrize("primitive", ["decode", "code_grad", "decode_residual"])
def test_annealing_k_compiles_once_for_a_power_of_two(primitive: str) -> None:
    assert compiled(primitive, [k for k in range(33, 65, 3) if k % 16]) == 1
    # A multiple of 16 has a kernel of its own, which knows that its codes are aligned.
    assert compiled(primitive, [63, 64, 62, 48, 40]) == 2


# Multiplications of a matrix instruction, which four warps (of Hopper's) or one do together.
WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")
MMA = re.compile(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")


@pytest.mark.parametrize(("written_in", "sm"), [("triton", 80), ("triton", 90), ("gluon", 90)])
@pytest.mark.parametrize(
    ("primitive", "kernel", "atomics"),
    [
        ("select_topk", "_encode_pass", 1),
        ("select_topk_routed", "_encode_pass", 1),
        ("select_threshold", "_find", 2),  # one counts, the next gives a place
    ],
)
def test_instructions_of_an_element(
    primitive: str, kernel: str, atomics: int, written_in: str, sm: int
) -> None:
    if (primitive, written_in) not in calls.kernels():
        pytest.skip(f"{primitive} is not written in {written_in}")
    found: dict[str, str] = {}

    def note(name: str, ptx: str) -> str:
        found[name] = ptx
        return ptx

    arguments = calls.arguments(primitive, Shape(17, 128, 4096, 8), experts=2)
    with triton_driver.emulated(sm, note):
        calls.implementation(primitive, written_in).run(*arguments)
        tile = calls.implementation("select_topk", written_in).tile_for(*arguments[:2])
    copies = 2 if written_in == "gluon" else 1  # two groups of warps, each with a program
    # A compiler may copy inline PTX, whose atomics then count some elements twice.
    in_a_thread = tile.rows * tile.columns // (32 * tile.warps)
    assert found[kernel].count("@passes atom.global") == copies * atomics * in_a_thread
    assert found[kernel].count("@fits st.global") == copies * in_a_thread
    # The loop over d_in is there once, and its products are those of the tile.
    matrix, together = (WGMMA, 4) if sm == 90 else (MMA, 1)
    done = sum(math.prod(map(int, shape)) for shape in matrix.findall(found[kernel]))
    depth = tile.depth // arguments[0].element_size()
    assert done * tile.warps // together // copies == tile.rows * tile.columns * depth


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_few_tokens_read_the_rows_of_a_tile_once(dtype: torch.dtype) -> None:
    found: dict[str, list[str]] = {}

    def note(name: str, ptx: str) -> str:
        found.setdefault(name, []).append(ptx)
        return ptx

    with triton_driver.emulated(90, note):
        for n_tokens in (16, 9) if dtype == torch.float32 else (16, 9, 2, 1):
            arguments = calls.arguments("select_topk", Shape(n_tokens, 256, 512, 8), dtype)
            calls.implementation("select_topk", "triton").run(*arguments)
    (ptx,) = found["_score"]  # one kernel for as many tokens as a tile has room for
    assert len(found["_merge"]) == 1
    # The loop over d_in is there once and its first three steps before it: what 128 threads copy,
    # 16 bytes each, is 128 bytes of 64 rows of W and of 16 tokens, four times.
    copied = len(re.findall(r"cp\.async\.cg\.shared\.global [^,]*, [^,]*, 0x10", ptx))
    assert 128 * 16 * copied == 4 * 128 * (64 + 16)
