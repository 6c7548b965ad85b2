"""How often kernels are compiled while training changes the arguments of their calls."""

from __future__ import annotations

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


@pytest.mark.parametrize(("written_in", "sm"), [("triton", 80), ("triton", 90), ("gluon", 90)])
def test_an_element_has_one_atomic_and_one_store(written_in: str, sm: int) -> None:
    # A compiler may copy inline PTX, whose atomics then count some elements twice.
    found: dict[str, str] = {}

    def note(name: str, ptx: str) -> str:
        found[name] = ptx
        return ptx

    arguments = calls.arguments("select_topk", Shape(3, 64, 512, 8))
    kernels = calls.implementation("select_topk", written_in)
    with triton_driver.emulated(sm, note):
        kernels.run(*arguments)
        tile = kernels.tile_for(*arguments[:2])
    in_a_thread = tile.rows * tile.columns // (32 * tile.warps)
    assert found["_encode_pass"].count("@passes atom.global") == in_a_thread
    assert found["_encode_pass"].count("@fits st.global") == in_a_thread
