"""A pytest plugin: what tests compile for the emulator is also compiled for the GPU, into a cache.

``pytest --emulate sm_90 -p benchmarks.gpu_check.compiled_tests tests/primitives`` fills the folder
that `VARIABLE` names with the kernels that the same tests need on a GPU.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction

VARIABLE = "SAE_KERNELS_COMPILED"
_assemble = CUDABackend.make_cubin  # before the emulator takes its place
_compile = JITFunction._do_compile


def _compile_twice(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
    constants, options, attributes, _ = rest
    target = self.device_caches[device][2]
    surroundings = {"TRITON_CACHE_DIR": os.environ[VARIABLE], "TRITON_STORE_BINARY_ONLY": "1"}
    with (
        mock.patch.object(CUDABackend, "make_cubin", _assemble),
        mock.patch.dict(os.environ, surroundings),
    ):
        source = self.ASTSource(self, signature, constants, attributes)
        kernel = self.compile(source, target=target, options=options.__dict__)
        CudaLauncher(kernel.src, kernel.metadata)
    return _compile(self, key, signature, device, *rest)


def pytest_configure(config: pytest.Config) -> None:
    """Compiles twice from here on, in a run that is emulated."""
    if not config.getoption("--emulate"):
        raise pytest.UsageError("compiled_tests: needs --emulate sm_90, whose kernels it compiles")
    JITFunction._do_compile = _compile_twice


def pytest_unconfigure() -> None:
    """Ends it."""
    JITFunction._do_compile = _compile
