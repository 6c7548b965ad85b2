"""Puts the emulator behind Triton's compiler and launcher, for tensors on the CPU."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from emulator import library
from sae_kernels import gpu

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes per block
MULTIPROCESSORS = 3  # blocks of persistent kernels: several, and each with several tiles
_devices = itertools.count(1000)  # Triton caches what it loaded by device
Edit = Callable[[str, str], str]


def storages(*arguments: Any) -> Iterator[tuple[int, int]]:
    """Address and bytes of the storage of every tensor among a launch's arguments."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            storage = argument.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()
        elif isinstance(argument, (tuple, list)):
            yield from storages(*argument)
        elif isinstance(getattr(argument, "base", None), torch.Tensor):  # a tensor descriptor
            yield from storages(argument.base)


@contextlib.contextmanager
def emulated(
    architecture: int, edit: Edit | None = None, seed: int = 0, *, idle: bool = False
) -> Iterator[None]:
    """Inside the block Triton's kernels run on CPU tensors, emulated for that architecture.

    Args:
        architecture: 80 or 90.
        edit: called with a kernel's name and PTX; what it returns runs instead.
        seed: of the order of warps.
        idle: kernels are compiled and launched, but do nothing: results hold what memory held. What
            a call then takes is the host's work.
    """
    emulator = library.library()
    from triton.backends.nvidia import compiler
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    class Launcher(nvidia.CudaLauncher):  # type: ignore[misc]
        """Triton's own, after naming the tensors that the kernel was given."""

        def __call__(self, *arguments: Any) -> None:
            if not idle:
                library.name_tensors(*storages(*arguments))
            super().__call__(*arguments)

    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        ptx = binary.decode()
        kernel = library.load(ptx if edit is None else edit(name, ptx), name)
        return kernel, kernel, 0, 0, 1024  # module, function, registers, spills, most threads

    def only_ptx(self: Any, ptx: str, *_: object) -> bytes:
        return ptx.encode()  # the assembler has tests of its own

    device = next(_devices)
    real = nvidia.CudaUtils()
    active = SimpleNamespace(
        utils=SimpleNamespace(
            load_binary=load_binary,
            fill_tma_descriptor=real.fill_tma_descriptor,
            get_device_properties=lambda device: {"max_shared_mem": SHARED_LIMIT[architecture]},
        ),
        launcher_cls=Launcher,
        get_current_target=lambda: compiler.GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: device,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    capability = divmod(architecture, 10)
    before = driver._active
    emulator.emulator_seed(seed)
    emulator.emulator_idle(idle)
    driver.set_active(active)
    with contextlib.ExitStack() as stack:
        stack.callback(driver.set_active, before)
        stack.callback(emulator.emulator_idle, 0)
        for target, name, value in (
            (compiler.CUDABackend, "make_cubin", only_ptx),
            (gpu, "triton_reason", lambda device: None),
            (gpu, "multiprocessors", lambda device: MULTIPROCESSORS),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (torch.cuda, "get_device_name", lambda device=None: f"an emulated sm_{architecture}"),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        # A cache of its own: what it holds is no program of a GPU.
        cache = {"TRITON_CACHE_DIR": str(library.CACHE / "triton")}
        stack.enter_context(mock.patch.dict(os.environ, cache))
        yield


def replacing(kernel: str, *replacements: tuple[str, str]) -> Edit:
    """An edit that plants a fault: patterns, and what replaces their first match in a kernel."""

    def edit(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        for pattern, replacement in replacements:
            ptx, n = re.subn(pattern, replacement, ptx, count=1, flags=re.DOTALL)
            assert n, f"{kernel} has nothing like {pattern!r} to replace"
        return ptx

    return edit
