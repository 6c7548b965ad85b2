"""Small kernels in PTX, for what no kernel of the package does."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from emulator import library
from emulator.triton_driver import storages

if TYPE_CHECKING:
    import torch

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 out)
{
    .reg .pred %p<9>;
    .reg .b32 %r<19>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd1, %r0, 4;
    add.u64 %rd1, %rd0, %rd1;
    mov.u32 %r9, memory;
    shl.b32 %r1, %r0, 2;
    add.u32 %r1, %r1, %r9;
"""


def run(
    body: str, out: torch.Tensor, *, blocks: int = 1, threads: int = 64, shared: int = 256
) -> torch.Tensor:
    """Runs a kernel of these instructions.

    They find the output's address in %rd0, that of the thread's own element in %rd1 (fp32 or int32)
    and in shared memory in %r1, and the thread's number in %r0.

    Raises:
        RuntimeError: what the emulator finds.
    """
    emulator = library.library()
    kernel = library.load(HEAD + body + "\n    ret;\n}\n", "kernel")
    library.name_tensors(*storages(out))
    words = (ctypes.c_uint64 * 1)(out.data_ptr())
    error = emulator.emulator_launch(kernel, blocks, threads, shared, words, 1)
    if error is not None:
        raise RuntimeError(error.decode())
    return out
