"""Builds the emulator and talks to it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from sae_kernels import gpu

SOURCES = Path(__file__).parent / "src"
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "emulator"
TRIED_WITH = (3, 6)  # its launcher and driver module are Triton's inner workings
# Not -ffast-math or contraction: what a GPU rounds twice is rounded twice.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")


def unavailable() -> str | None:
    """The reason why nothing can be emulated here, or None."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"the emulator was tried on Linux on x86_64, this is {platform.platform()}"
    if gpu.interpreted():
        return "TRITON_INTERPRET is set: kernels are interpreted and not compiled"
    if gpu.triton_version() is None:
        return "Triton is not installed, whose compiler makes what is emulated"
    if gpu.triton_version() != TRIED_WITH:
        came, tried = (".".join(map(str, v or ())) for v in (gpu.triton_version(), TRIED_WITH))
        return f"the emulator was tried with the launcher of Triton {tried}, found {came}"
    if _compiler() is None:
        return "no C++ compiler: neither CXX nor c++"
    return None


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++")


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator, compiled where its sources changed; every process of the machine loads it."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # cuda.h
    sources = sorted(SOURCES.iterdir())
    text = b"".join(path.read_bytes() for path in sources) + " ".join(FLAGS).encode()
    folder = CACHE / hashlib.sha256(text).hexdigest()[:16]
    path = folder / "libcuda.so.1"  # as Triton's launcher looks for it
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"building-{os.getpid()}"
        units = [str(source) for source in sources if source.suffix == ".cpp"]
        compiler = _compiler()
        assert compiler is not None
        done = subprocess.run(
            [compiler, *FLAGS, f"-I{include}", *units, "-o", str(own)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"the emulator does not compile: {done.stderr}")
        own.replace(path)  # at once: another process may have been faster
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return _declared(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    word, address = ctypes.c_uint64, ctypes.c_void_p
    for name, result, *arguments in (
        ("emulator_load", address, ctypes.c_char_p, ctypes.c_char_p),
        ("emulator_error", ctypes.c_char_p),
        ("emulator_seed", None, word),
        ("emulator_limit", None, word),
        ("emulator_idle", None, word),
        ("emulator_launches", word),
        ("emulator_instructions", word),
        ("emulator_forget_tensors", None),
        ("emulator_add_tensor", None, word, word),
        (
            "emulator_launch",
            ctypes.c_char_p,
            address,
            ctypes.c_uint32,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.POINTER(word),
            ctypes.c_int,
        ),
    ):
        function = getattr(loaded, name)  # type: ignore[arg-type]
        function.restype, function.argtypes = result, arguments
    return loaded


def load(ptx: str, name: str) -> int:
    """A kernel of a module, for launches.

    Raises:
        RuntimeError: something in it is unknown to the emulator, by line.
    """
    kernel = library().emulator_load(ptx.encode(), name.encode())
    if not kernel:
        raise RuntimeError(f"the emulator cannot load {name}: {error()}")
    return int(kernel)


def error() -> str:
    """What went wrong last."""
    return str(library().emulator_error().decode())


def name_tensors(*storages: tuple[int, int]) -> None:
    """Says which memory the next launch may access: addresses and bytes."""
    emulator = library()
    emulator.emulator_forget_tensors()
    for address, size in storages:
        if size:
            emulator.emulator_add_tensor(address, size)
