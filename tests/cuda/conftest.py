"""The real CUDA kernels on CPU tensors, compiled with the host's C++ compiler (see host/)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sae_kernels.backends import cuda

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HOST = Path(__file__).parent / "host"
# _FORTIFY_SOURCE, which some compilers bring along, takes a jump to another stack for an attack.
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")


def compile_for_host(folder: Path, library: Path) -> Callable[..., None]:
    """The kernels of a folder of sources as a function: kernel, grid, block, shared, words."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: neither CXX nor c++")
    source, library_path = str(HOST / "kernels.cpp"), str(library)
    subprocess.run([compiler, *FLAGS, f"-I{folder}", source, "-o", library_path], check=True)
    function = ctypes.CDLL(library_path).launch
    function.restype = ctypes.c_char_p

    def launch(
        kernel: str, grid: int, block: int, shared: int, words: Sequence[int], schedule: int
    ) -> None:
        array = (ctypes.c_longlong * len(words))(*words)
        sizes = (ctypes.c_longlong(size) for size in (grid, block, shared))
        count = ctypes.c_longlong(len(words))
        error = function(kernel.encode(), *sizes, array, count, schedule)
        if error is not None:
            raise RuntimeError(error.decode())

    return launch


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """The kernels as they are, compiled once."""
    folder = cuda.sources()
    assert folder is not None
    return compile_for_host(folder, tmp_path_factory.mktemp("host") / "kernels.so")


class OnHost:
    """The backend "cuda" on CPU tensors.

    Attributes:
        schedule: the order of threads: 0 ascending, 1 descending, any other number at random.
        launches: the kernels that ran.
    """

    def __init__(self, kernels: Callable[..., None]) -> None:
        self.kernels = kernels
        self.schedule = 0
        self.launches: list[str] = []

    def launch(
        self, kernel: str, device: int | None, grid: int, block: int, shared: int, words: list[int]
    ) -> None:
        """What a route does on a GPU."""
        self.launches.append(kernel)
        self.kernels(kernel, grid, block, shared, words, self.schedule)


@pytest.fixture
def on_host(
    monkeypatch: pytest.MonkeyPatch,
    host_kernels: Callable[..., None],
    poisoned: None,
    one_thread: None,
) -> OnHost:
    """Makes ``backend="cuda"`` run on CPU tensors."""
    host = OnHost(host_kernels)
    monkeypatch.setattr(cuda, "_route", lambda device: cuda.Route("on the host", host.launch))
    monkeypatch.setattr(
        cuda, "reason", lambda device, dtype: None if dtype in cuda._DTYPES else f"no {dtype}"
    )
    return host
