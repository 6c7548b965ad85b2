"""What the tests of the encoder's primitives share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import refusals
import torch

from sae_kernels import gpu
from sae_kernels.backends import cpu
from sae_kernels.testing import CASES

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
# Bits of NaN: quiet and signalling, of both signs.
payloads = pytest.mark.parametrize(
    "payload", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], ids=hex
)


def needs(primitive: str, dtype: torch.dtype, backend: str, arguments: Sequence[Any]) -> None:
    """Skips a call that a backend refuses, and in the interpreter fp16."""
    if gpu.interpreted() and dtype == torch.float16:
        pytest.skip("Triton's interpreter is slow, and fp16 differs from bf16 in the loads alone")
    refusals.needs(primitive, dtype, backend, arguments)


def sample(items: Sequence[T], n: int) -> Sequence[T]:
    """All items, or about n of them in Triton's interpreter, which is slow."""
    return items[:: max(1, len(items) // n)] if gpu.interpreted() else items


def flushed(backend: str, dtype: torch.dtype, *operands: torch.Tensor) -> float:
    """The largest operand if what is in use gets subnormals of bf16 wrong, else 0."""
    # AMX takes them for zero; Triton's interpreter widens them to something smaller.
    amx = backend == "cpu" and cpu.isa() == "amx"
    if dtype != torch.bfloat16 or not (amx or gpu.interpreted()):
        return 0.0
    return max((float(t.abs().nan_to_num(0, 0, 0).max()) for t in operands if t.numel()), default=0)


def scales(n_latents: int) -> torch.Tensor:
    """A rank_scale of powers of two, which keep the exact kinds exact, of 0 and a negative one."""
    some = torch.tensor([1.0, 2.0, 0.5, 4.0, 0.0, -1.0, 1.0])
    return some.repeat(n_latents // 7 + 1)[:n_latents]


def from_bits(payload: int) -> torch.Tensor:
    """The fp32 number of these bits."""
    return torch.tensor([payload], dtype=torch.uint32).view(torch.float32)
