"""Puts the emulator behind the CUDA C++ kernels, as nvcc compiles them to PTX."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING
from unittest import mock

import torch

from emulator import library
from emulator.triton_driver import Edit, storages
from sae_kernels.backends import cuda

if TYPE_CHECKING:
    from collections.abc import Iterator


def unavailable() -> str | None:
    """The reason why the kernels cannot be compiled here, or None."""
    if shutil.which("nvcc") is None:
        return "no nvcc in the PATH"
    return None if cuda.sources() is not None else "the kernels' sources are not there"


@functools.cache
def ptx(architecture: int) -> str:
    """The PTX of csrc/cuda, compiled where a source changed."""
    folder, nvcc = cuda.sources(), shutil.which("nvcc")
    assert folder is not None
    assert nvcc is not None
    text = cuda.translation_unit(folder)  # with the digest of what it includes
    name = hashlib.sha256(f"{nvcc} {architecture} {text}".encode()).hexdigest()[:16]
    path = library.CACHE / f"cuda-{name}.ptx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unit, own = path.with_suffix(f".{os.getpid()}.cu"), path.with_suffix(f".{os.getpid()}")
        unit.write_text(text)
        flags = ["-std=c++17", f"-arch=compute_{architecture}", "-ptx", f"-I{folder}"]
        subprocess.run([nvcc, *flags, str(unit), "-o", str(own)], check=True)
        unit.unlink()
        own.replace(path)
    return path.read_text()


@contextlib.contextmanager
def emulated(architecture: int, edit: Edit | None = None) -> Iterator[None]:
    """Inside the block ``backend="cuda"`` runs on CPU tensors, emulated for that architecture."""
    emulator = library.library()

    @functools.cache
    def kernel_of(name: str) -> int:
        text = ptx(architecture)
        return library.load(text if edit is None else edit(name, text), name)

    def launch(
        kernel: str, grid: int, block: int, shared: int, *arguments: torch.Tensor | int | None
    ) -> None:
        words = [a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments]
        library.name_tensors(*storages(*arguments))
        array = (ctypes.c_uint64 * len(words))(*words)
        launched = kernel_of(kernel), grid, block, shared, array, len(words)
        error = emulator.emulator_launch(*launched)
        if error is not None:
            raise RuntimeError(error.decode())

    def reason(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype in cuda._DTYPES:
            return None
        return f"no kernel for {dtype}, only for float32, bfloat16 and float16"

    with mock.patch.object(cuda, "launch", launch), mock.patch.object(cuda, "reason", reason):
        yield
