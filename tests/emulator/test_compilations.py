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
