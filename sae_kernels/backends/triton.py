"""Backend triton: kernels in Triton, for NVIDIA GPUs.

On a machine without a GPU they run in Triton's interpreter (``TRITON_INTERPRET=1`` before the first
import), which is for checking: it is thousands of times slower. The interpreter knows no inline
assembly and multiplies bf16 operands of ``tl.dot`` wrongly, so launchers ask
:func:`sae_kernels.gpu.interpreted` for the portable variant of a kernel.
"""

from __future__ import annotations

import torch

from sae_kernels import gpu

# int16: halves of split master weights. int32 and int64: primitives of indices or counters alone.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_FLOATS, torch.int16, torch.int32, torch.int64)


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot run a call, or None."""
    if dtype not in _DTYPES:
        return f"no kernel for {dtype}, only for float32, bfloat16 and float16"
    return gpu.triton_reason(device)
